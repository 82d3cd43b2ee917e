"""Sources to batches and facts; importing this room registers every data set."""

from selectra.data.clip_batches import ClipBatch as ClipBatch
from selectra.data.clips import Clips as Clips
from selectra.data.image_shards import ImageShards as ImageShards
from selectra.data.images import ImageBatch as ImageBatch
from selectra.data.images import Images as Images
from selectra.data.mask_views import MaskBatch as MaskBatch
from selectra.data.masks import Masks as Masks
from selectra.data.moving_shapes import MovingShapes as MovingShapes
from selectra.data.object_views import ObjectBatch as ObjectBatch
from selectra.data.objects import Objects as Objects
from selectra.data.recall import Copying as Copying
from selectra.data.recall import Recall as Recall
from selectra.data.series import SeriesData as SeriesData
from selectra.data.series import SeriesFile as SeriesFile
from selectra.data.shards import TextShards as TextShards
from selectra.data.text import TextData as TextData
from selectra.data.text import TextFile as TextFile
