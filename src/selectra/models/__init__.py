"""The architectures: one file each, one line each; some have their readers of official weights in a file beside."""

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
from .rsmamba_official import read_rsmamba as read_rsmamba
from .s_mamba import SMamba as SMamba
from .simba import Simba as Simba
from .simba_official import read_simba as read_simba
from .simba_series import SimbaSeries as SimbaSeries
from .timemachine import TimeMachine as TimeMachine
from .tsm2 import TSM2 as TSM2
from .tsmixer import TSMixer as TSMixer
from .videomamba import VideoMamba as VideoMamba
from .vim import Vim as Vim
from .vim2 import ViM2 as ViM2
from .vmamba import VMamba as VMamba
from .vmamba_official import read_vssm as read_vssm
