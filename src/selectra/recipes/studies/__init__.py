"""Built-in studies by name: one function a file, one line here; `selectra compare NAME` does one."""

from selectra.recipes.studies.channel_mixers import channel_mixers as channel_mixers
from selectra.recipes.studies.cifar10 import cifar10 as cifar10
from selectra.recipes.studies.directions import directions as directions
from selectra.recipes.studies.language_copying import language_copying as language_copying
from selectra.recipes.studies.language_recall import language_recall as language_recall
from selectra.recipes.studies.language_shakespeare import language_shakespeare as language_shakespeare
from selectra.recipes.studies.selection import selection as selection
from selectra.recipes.studies.series_kinds import series_kinds as series_kinds
