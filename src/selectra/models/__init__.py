"""The architectures: one file each, one line each."""

from .dlinear import DLinear as DLinear
from .gpt import GPT as GPT
from .gru import GRU as GRU
from .hyena import Hyena as Hyena
from .itransformer import ITransformer as ITransformer
from .jamba import Jamba as Jamba
from .linear import Linear as Linear
from .mamba_lm import MambaLM as MambaLM
from .mambavision import MambaVision as MambaVision
from .naive import Naive as Naive
from .naive import SeasonalNaive as SeasonalNaive
from .nlinear import NormLinear as NormLinear
from .patchtst import PatchTST as PatchTST
from .retnet import RetNet as RetNet
from .rsmamba import RSMamba as RSMamba
from .rwkv import RWKV as RWKV
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
