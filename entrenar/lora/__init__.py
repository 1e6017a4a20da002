"""Low-rank adapters beside frozen linear layers."""

from entrenar.lora.layers import Int4Linear, LoRALayer, QLoRALayer

__all__ = ["Int4Linear", "LoRALayer", "QLoRALayer"]
