"""Base models as plain Python over the ops: configuration, rotary tables, one decoder."""

from loraserve.models.config import ModelConfig
from loraserve.models.decoder import Decoder
from loraserve.models.rope import RopeConfig

__all__ = ["Decoder", "ModelConfig", "RopeConfig"]
