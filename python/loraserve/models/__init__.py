"""Base models as plain Python over the ops: configuration, rotary tables, one decoder."""

from loraserve.models.config import ModelConfig, RopeConfig
from loraserve.models.decoder import Decoder

__all__ = ["Decoder", "ModelConfig", "RopeConfig"]
