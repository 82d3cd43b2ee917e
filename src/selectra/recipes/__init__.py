"""Complete runs by name: one function a file, one line here; `selectra train NAME` starts one."""

from selectra.recipes.shakespeare import shakespeare as shakespeare
from selectra.recipes.tsm2_etth1 import tsm2_etth1 as tsm2_etth1
from selectra.recipes.tsm2_weather import tsm2_weather as tsm2_weather
