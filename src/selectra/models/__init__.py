"""The architectures: one file each, one line each."""

from .convnext import ConvNeXt as ConvNeXt
from .dlinear import DLinear as DLinear
from .gru import GRU as GRU
from .itransformer import ITransformer as ITransformer
from .linear import Linear as Linear
from .mambavision import MambaVision as MambaVision
from .mlp_mixer import MLPMixer as MLPMixer
from .naive import Naive as Naive
from .naive import SeasonalNaive as SeasonalNaive
from .nlinear import NormLinear as NormLinear
from .patchtst import PatchTST as PatchTST
from .resnet import ResNet as ResNet
from .rsmamba import RSMamba as RSMamba
from .s_mamba import SMamba as SMamba
from .simba import Simba as Simba
from .simba_series import SimbaSeries as SimbaSeries
from .swin import Swin as Swin
from .timemachine import TimeMachine as TimeMachine
from .tsm2 import TSM2 as TSM2
from .tsmixer import TSMixer as TSMixer
from .videomamba import VideoMamba as VideoMamba
from .vim import Vim as Vim
from .vim2 import ViM2 as ViM2
from .vit import DeiT as DeiT
from .vit import ViT as ViT
from .vmamba import VMamba as VMamba
