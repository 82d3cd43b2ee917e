"""Complete runs by name: one function a run, one line here; `selectra train NAME` starts one."""

from selectra.recipes.bccd import resnet_bccd as resnet_bccd
from selectra.recipes.bccd import vmamba_bccd as vmamba_bccd
from selectra.recipes.camvid import convnext_camvid as convnext_camvid
from selectra.recipes.camvid import samba_camvid as samba_camvid
from selectra.recipes.camvid import vim2_camvid as vim2_camvid
from selectra.recipes.camvid import vim_camvid as vim_camvid
from selectra.recipes.camvid import vit_camvid as vit_camvid
from selectra.recipes.camvid import vmamba_camvid as vmamba_camvid
from selectra.recipes.cifar10 import convnext_cifar10 as convnext_cifar10
from selectra.recipes.cifar10 import mlp_mixer_cifar10 as mlp_mixer_cifar10
from selectra.recipes.cifar10 import resnet18_cifar10 as resnet18_cifar10
from selectra.recipes.cifar10 import simba_cifar10 as simba_cifar10
from selectra.recipes.cifar10 import swin_cifar10 as swin_cifar10
from selectra.recipes.cifar10 import vim2_cifar10 as vim2_cifar10
from selectra.recipes.cifar10 import vim_cifar10 as vim_cifar10
from selectra.recipes.cifar10 import vit_cifar10 as vit_cifar10
from selectra.recipes.cifar10 import vmamba_cifar10 as vmamba_cifar10
from selectra.recipes.coco_mini import simba_coco_mini as simba_coco_mini
from selectra.recipes.coco_mini import vim2_coco_mini as vim2_coco_mini
from selectra.recipes.shakespeare import shakespeare as shakespeare
from selectra.recipes.shakespeare import shakespeare_small as shakespeare_small
from selectra.recipes.tsm2_etth1 import tsm2_etth1 as tsm2_etth1
from selectra.recipes.tsm2_weather import tsm2_weather as tsm2_weather
from selectra.recipes.ucmerced import resnet18_ucmerced as resnet18_ucmerced
from selectra.recipes.ucmerced import rsmamba_ucmerced as rsmamba_ucmerced
from selectra.recipes.ucmerced import vit_ucmerced as vit_ucmerced
