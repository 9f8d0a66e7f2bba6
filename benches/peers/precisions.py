"""How the offline workload's weights are kept, and what each engine is told to have them so."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Precision:
    """Arithmetic that isn't on integers is of `dtype`, whatever the weights are kept in.

    `gguf` is the type of llama.cpp's file, by llama-quantize's names. `quantization` is what an engine that
    quantises the checkpoint itself makes of it (loraserve's setting, OpenVINO's weight format).
    """

    name: str
    dtype: str
    gguf: str
    quantization: str | None = None

    @property
    def is_quantized(self) -> bool:
        return self.quantization is not None


PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("bf16", "bfloat16", "BF16"),
        Precision("f32", "float32", "F32"),
        Precision("int8", "bfloat16", "Q8_0", "int8"),
        Precision("int4", "bfloat16", "Q4_0", "int4"),
        Precision("int4-k", "bfloat16", "Q4_K_M", "int4"),
    )
}
