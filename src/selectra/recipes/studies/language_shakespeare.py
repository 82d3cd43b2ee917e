"""Six families of language models on Tiny Shakespeare, character by character, at equal parameters and tokens."""

from selectra.compare.study import Budget, Study, Tuning
from selectra.recipes.studies.language_shared import TEN_MILLION, TITLE, TUNED, families
from selectra.registry import studies
from selectra.spec import Optim, Run, Spec, Train

RATES = (1e-3, 2e-3)
STEPS, BATCH, SEQ_LEN = 1500, 32, 256


@studies.register("language_shakespeare", kind="language", source="github.com/karpathy/char-rnn")
def language_shakespeare() -> Study:
    """Does Mamba beat a Transformer, RWKV, RetNet and Hyena of 10.6 million parameters on Tiny Shakespeare?

    30 trainings of 1,500 steps of 8,192 characters, dropout, weight decay and clipping as in nanoGPT's recipe for this
    text. The first half of the last 10 % chooses learning rate and weights, the second half is the test.
    """
    base = Run(
        name="Tiny Shakespeare",
        model=Spec("gpt_smoke"),
        data=Spec("tiny_shakespeare", seq_len=SEQ_LEN, stride=16, shares=(0.9, 0.05, 0.05)),
        task=Spec("language"),
        optim=Optim(lr=RATES[0], weight_decay=0.1, betas=(0.9, 0.99), warmup_steps=100),
        train=Train(steps=STEPS, batch_size=BATCH, eval_every=STEPS // 12, precision="bfloat16"),
    )
    return Study(
        name="language_shakespeare",
        question="Is Mamba a better language model than a Transformer of the same size?",
        bases=(base,),
        variants=families(TEN_MILLION, dropout=0.2),
        subject="mamba",
        subject_title=TITLE,
        declared=TUNED,
        tuning=Tuning(values={"optim.lr": RATES}),
        budget=Budget(quantity="params", amount=10_600_000, align=8),
        metric="loss",
    )
