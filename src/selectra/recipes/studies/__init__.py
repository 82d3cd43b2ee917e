"""Built-in studies by name: one function a file, one line here; `selectra compare NAME` does one."""

from selectra.recipes.studies.channel_mixers import channel_mixers as channel_mixers
from selectra.recipes.studies.channel_mixers_deep import channel_mixers_deep as channel_mixers_deep
from selectra.recipes.studies.channel_mixers_images import channel_mixers_images as channel_mixers_images
from selectra.recipes.studies.cifar10 import cifar10 as cifar10
from selectra.recipes.studies.directions import directions as directions
from selectra.recipes.studies.discretisation import discretisation as discretisation
from selectra.recipes.studies.image_kinds import image_kinds as image_kinds
from selectra.recipes.studies.language_copying import language_copying as language_copying
from selectra.recipes.studies.language_recall import language_recall as language_recall
from selectra.recipes.studies.language_shakespeare import language_shakespeare as language_shakespeare
from selectra.recipes.studies.scan_orders import scan_orders as scan_orders
from selectra.recipes.studies.selection import selection as selection
from selectra.recipes.studies.selection_images import selection_images as selection_images
from selectra.recipes.studies.series_kinds import series_kinds as series_kinds
