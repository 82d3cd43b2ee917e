"""The architectures: one file each, one line each."""

from .baselines import ConvNeXt as ConvNeXt
from .baselines import DeiT as DeiT
from .baselines import MLPMixer as MLPMixer
from .baselines import ResNet as ResNet
from .baselines import Swin as Swin
from .baselines import ViT as ViT
from .dlinear import DLinear as DLinear
from .gru import GRU as GRU
from .itransformer import ITransformer as ITransformer
from .linear import Linear as Linear
from .mambavision import MambaVision as MambaVision
from .naive import Naive as Naive
from .naive import SeasonalNaive as SeasonalNaive
from .nlinear import NormLinear as NormLinear
from .patchtst import PatchTST as PatchTST
from .rsmamba import RSMamba as RSMamba
from .s_mamba import SMamba as SMamba
from .simba import Simba as Simba
from .simba_series import SimbaSeries as SimbaSeries
from .timemachine import TimeMachine as TimeMachine
from .tsm2 import TSM2 as TSM2
from .tsmixer import TSMixer as TSMixer
from .videomamba import VideoMamba as VideoMamba
from .vim import Vim as Vim
from .vim2 import ViM2 as ViM2
from .vmamba import VMamba as VMamba
