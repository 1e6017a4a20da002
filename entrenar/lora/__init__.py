"""Low-rank adapters beside frozen linear layers."""

from entrenar.lora.adapter import load_adapter, save_adapter
from entrenar.lora.layers import Int4Linear, LoRALayer, QLoRALayer
from entrenar.lora.wrap import wrap

__all__ = ["Int4Linear", "LoRALayer", "QLoRALayer", "load_adapter", "save_adapter", "wrap"]
