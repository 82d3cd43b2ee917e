// Time cut into pieces that run side by side, for calls whose channels give fewer tasks than there are threads.
//
// A piece can only run from the state before it. What a stretch of steps makes of any state is one decay and one
// addition, exp(A sum of dt) h + e, where e is what it makes of a state of zero: its effect, which is found without
// outputs, gate or sums over states. The first piece runs at once; meanwhile the other threads find the effects of the
// stretches behind `head`, chain them to the state that the first piece leaves there, and run the other pieces. The
// backward does the same with the state's gradient, from the last step to the first.
//
// The cut follows from the sizes and the number of threads, never from which thread was faster.
#pragma once

#include <stdlib.h>

#include "scan_tiles.h"

namespace selectra {
namespace {

// Where the pieces of one run of chunks begin: with k pieces of length 1 and effects that cost `effect` of a piece, the
// first piece has the length 1 + effect, so that it comes to the first stretch when the effects are known.
struct TimeCut {
  int64_t chunks, pieces;
  double effect;

  int64_t border(int64_t i) const {
    return i == pieces ? chunks : (int64_t)((double)chunks * (effect + (double)i) / (effect + (double)pieces));
  }
  // Piece i > 0 takes the chunks from border(i) to border(i + 1), the first one those from 0 on.
  int64_t begin(int64_t piece) const { return piece == 0 ? 0 : border(piece); }
  int64_t end(int64_t piece) const { return border(piece + 1); }
};

// What one task does.
struct Job {
  enum Kind { kPiece, kEffect } kind;
  // The range of sequences; the slot of channels, which counts through the groups too.
  int64_t part, slot;
  // The piece, or the stretch before piece `piece` whose effect is to be found.
  int64_t piece;
};

// A sum that keeps what rounding takes away from it: of the steps of a long stretch.
struct LongSum {
  Vector total, lost;
  SELECTRA_INLINE void add(LongSum& sum, Vector x) {
    const Vector corrected = x - sum.lost, next = sum.total + corrected;
    sum.lost = (next - sum.total) - corrected;
    sum.total = next;
  }
};

// The cut of a whole call. A part is a range of sequences; only a part of a single sequence is ever cut.
class TimeCuts {
 public:
  // `slots`: tasks of a part. `effect`: the time that an effect takes over that of a piece.
  TimeCuts(const ScanCall& call, const Layout& layout, const Sequences& sequences, int64_t parts, int64_t slots,
           int64_t threads, double effect)
      : parts_(parts), slots_(slots), effect_(effect), block_pitch_(call.states + 1),
        record_pitch_(layout.blocks_per_group * call.groups * block_pitch_) {
    if (parts < call.sequences || (threads <= slots && call.pieces <= 1)) return;
    first_ = (int64_t*)malloc(sizeof(int64_t) * (parts + 1));
    if (!first_) return;
    int64_t total = 0;
    for (int64_t s = 0; s < parts; ++s) total += sequences[s].count;
    first_[0] = 0;
    for (int64_t s = 0; s < parts; ++s) {
      const Sequence sequence = sequences[s];
      // Shorter pieces are not worth their beginnings.
      constexpr int64_t kLeastChunks = 8;
      const int64_t most = call.pieces > 0 ? sequence.chunks() : sequence.chunks() / kLeastChunks;
      const int64_t share = larger<int64_t>(1, total * slots);
      const int64_t wanted = call.pieces > 0 ? call.pieces : threads * sequence.count / share;
      first_[s + 1] = first_[s] + larger<int64_t>(1, smaller(most, wanted));
    }
    // A record for every piece and slot, and whether it is there.
    const int64_t records = first_[parts];
    if (records == parts) return;
    const int64_t numbers = (int64_t)sizeof(Vector) * records * record_pitch_;
    memory_ = malloc((size_t)(numbers + 64 + (int64_t)sizeof(int32_t) * records * slots));
    if (!memory_) return;
    records_ = (Vector*)(((uintptr_t)memory_ + 63) / 64 * 64);
    ready_ = (int32_t*)((char*)records_ + numbers);
    memset(ready_, 0, sizeof(int32_t) * records * slots);
  }
  ~TimeCuts() {
    free(first_);
    free(memory_);
  }
  TimeCuts(const TimeCuts&) = delete;
  TimeCuts& operator=(const TimeCuts&) = delete;

  // Pieces of all parts. Without memory for the cuts there are none: the call takes longer.
  int64_t pieces() const { return first_ && (memory_ || first_[parts_] == parts_) ? first_[parts_] : parts_; }
  int64_t jobs() const { return (parts_ + 2 * (pieces() - parts_)) * slots_; }
  // Pieces before those of a part.
  int64_t first_piece(int64_t part) const { return memory_ ? first_[part] : part; }
  TimeCut cut(int64_t part, const Sequence& sequence) const {
    return {sequence.chunks(), first_piece(part + 1) - first_piece(part), effect_};
  }

  // First the first pieces, then the effects, then the other pieces: what a job waits for has a lower number.
  Job job(int64_t index) const {
    const int64_t slot = index % slots_, more = pieces() - parts_;
    int64_t order = index / slots_;
    if (order < parts_) return {Job::kPiece, order, slot, 0};
    order -= parts_;
    const Job::Kind kind = order < more ? Job::kEffect : Job::kPiece;
    if (kind == Job::kPiece) order -= more;
    int64_t part = 0;
    while (first_piece(part + 1) - (part + 1) <= order) ++part;
    return {kind, part, slot, order - (first_piece(part) - part) + 1};
  }

  // Records: of piece 0 the state at the cut's first border, of the others the effect of the stretch before them. For
  // every block of the group's blocks one vector, the sum of dt, and one for each state.
  Vector* record(int64_t part, int64_t piece, const Layout& layout, const BlockRange& range) const {
    const int64_t block = range.group * layout.blocks_per_group + range.first;
    return records_ + (first_piece(part) + piece) * record_pitch_ + block * block_pitch_;
  }

  void announce(const Job& job) const { __atomic_store_n(flag(job.part, job.piece, job.slot), 1, __ATOMIC_RELEASE); }

  // The state at the beginning of a later piece, of every block one after another.
  void chain(const Job& job, const Layout& layout, const BlockRange& range, const Vector* rates, int states,
             Vector* state) const {
    for (int64_t piece = 0; piece <= job.piece; ++piece) {
      await_flag(flag(job.part, piece, job.slot));
      const Vector* record = this->record(job.part, piece, layout, range);
      for (int index = 0; index < range.count(); ++index, record += block_pitch_) {
        for (int n = 0; n < states; ++n) {
          Vector& h = state[index * states + n];
          h = piece == 0 ? record[1 + n] : exp2_of_product(record[0], rates[index * states + n]) * h + record[1 + n];
        }
      }
    }
  }

  // Keeps the states of a range, and where it is an effect the sums of dt.
  void keep(const Job& job, const Layout& layout, const BlockRange& range, const LongSum* sums, int states,
            const Vector* state) const {
    Vector* record = this->record(job.part, job.piece, layout, range);
    for (int index = 0; index < range.count(); ++index, record += block_pitch_) {
      if (sums) record[0] = sums[index].total;
      memcpy(record + 1, state + index * states, sizeof(Vector) * states);
    }
    announce(job);
  }

 private:
  int32_t* flag(int64_t part, int64_t piece, int64_t slot) const {
    return ready_ + (first_piece(part) + piece) * slots_ + slot;
  }

  const int64_t parts_, slots_;
  const double effect_;
  const int64_t block_pitch_, record_pitch_;
  int64_t* first_ = nullptr;
  void* memory_ = nullptr;
  Vector* records_ = nullptr;
  int32_t* ready_ = nullptr;
};

// Runs the jobs in their order: a thread that waits for a job waits for one that runs.
template <typename Body>
SELECTRA_INLINE void for_each_job(const TimeCuts& cuts, int64_t threads, const Body& body) {
  int64_t next = 0;
  for_each_task(cuts.jobs(), threads, [&](int64_t) {
    body(cuts.job(__atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)));
  });
}

}  // namespace
}  // namespace selectra
