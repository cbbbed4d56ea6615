"""Small models, one for each kind of layer that takes a mixer, and what the tests do with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from moslora_core import MoSLoraConfig

TOKENS = 12


class Net(nn.Module):
    """The layer under test, a nonlinearity, and a head that stays as it is."""

    def __init__(self, layer: nn.Module, features: int):
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(features, 3)

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.hidden(x)).flatten(1))


class EmbeddingNet(Net):
    """The embedding's vectors are what the nonlinearity sees; flattening takes the positions together."""


class AttentionNet(Net):
    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x, x, x, need_weights=False)[0]


class Logits(nn.Module):
    """A language model as a function from ids to logits, under its own name so that targets keep theirs."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x).logits


def tiny_llama(**settings: Any) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=TOKENS,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        **settings,
    )
    return LlamaForCausalLM(config)


@dataclass(frozen=True)
class Kind:
    """A model with one kind of adapted layer.

    Attributes:
        build: makes the base model.
        inputs: makes a batch of the given size.
        targets: ``target_modules``.
        settings: further settings of the configuration.
        merges: whether PEFT merges this kind at all.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], torch.Tensor]
    targets: list[str] | str = field(default_factory=lambda: ["layer"])
    settings: dict[str, Any] = field(default_factory=dict)
    merges: bool = True

    def __str__(self) -> str:
        return self.name

    def base(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return self.build().eval()

    def batch(self, size: int = 4) -> torch.Tensor:
        torch.manual_seed(99)
        return self.inputs(size)

    def config(self, **settings: Any) -> MoSLoraConfig:
        return MoSLoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": self.targets} | self.settings | settings)

    def model(self, seed: int = 0, **settings: Any) -> PeftModel:
        """Base and a new adapter, reproducibly, in evaluation mode (no dropout is set unless asked for)."""
        base = self.base(seed)
        torch.manual_seed(seed + 1)
        return get_peft_model(base, self.config(**settings)).eval()


def _ids(size: int) -> torch.Tensor:
    return torch.randint(0, TOKENS, (size, 3))


LINEAR = Kind("linear", lambda: Net(nn.Linear(6, 8), 8), lambda n: torch.randn(n, 6))
CONV1D_GPT2 = Kind(
    "gpt2_conv1d", lambda: Net(Conv1D(8, 6), 8), lambda n: torch.randn(n, 6), settings={"fan_in_fan_out": True}
)
CONV1D = Kind("conv1d", lambda: Net(nn.Conv1d(3, 8, 3), 8 * 4), lambda n: torch.randn(n, 3, 6))
CONV2D = Kind("conv2d", lambda: Net(nn.Conv2d(3, 8, 3, stride=2, padding=1), 8 * 4), lambda n: torch.randn(n, 3, 4, 4))
CONV2D_1X1 = Kind("conv2d_1x1", lambda: Net(nn.Conv2d(3, 8, 1), 8 * 4), lambda n: torch.randn(n, 3, 2, 2))
CONV3D = Kind("conv3d", lambda: Net(nn.Conv3d(3, 8, 2), 8 * 8), lambda n: torch.randn(n, 3, 3, 3, 3))
GROUPED1D = Kind(
    "grouped_conv1d", lambda: Net(nn.Conv1d(4, 8, 3, groups=2), 8 * 4), lambda n: torch.randn(n, 4, 6), merges=False
)
GROUPED2D = Kind(
    "grouped_conv2d",
    lambda: Net(nn.Conv2d(4, 8, 3, groups=2), 8 * 4),
    lambda n: torch.randn(n, 4, 4, 4),
    merges=False,
)
GROUPED3D = Kind(
    "grouped_conv3d",
    lambda: Net(nn.Conv3d(4, 8, 2, groups=4), 8 * 8),
    lambda n: torch.randn(n, 4, 3, 3, 3),
    merges=False,
)
EMBEDDING = Kind("embedding", lambda: EmbeddingNet(nn.Embedding(TOKENS, 8), 8 * 3), _ids)
ATTENTION = Kind(
    "attention",
    lambda: AttentionNet(nn.MultiheadAttention(8, 2, batch_first=True), 8 * 3),
    lambda n: torch.randn(n, 3, 8),
)
LLAMA = Kind(
    "llama",
    lambda: Logits(tiny_llama()),
    _ids,
    targets=["q_proj", "v_proj", "down_proj", "embed_tokens"],
)
DORA = {"use_dora": True}
DORA_LINEAR = Kind("dora_linear", LINEAR.build, LINEAR.inputs, settings=DORA)
DORA_CONV2D = Kind("dora_conv2d", CONV2D.build, CONV2D.inputs, settings=DORA)
DORA_EMBEDDING = Kind("dora_embedding", EMBEDDING.build, EMBEDDING.inputs, settings=DORA)
RSLORA = Kind("rslora", LINEAR.build, LINEAR.inputs, settings={"use_rslora": True})
BIAS = Kind("lora_bias", LINEAR.build, LINEAR.inputs, settings={"lora_bias": True})

SINGLE = [LINEAR, CONV1D_GPT2, CONV1D, CONV2D, CONV2D_1X1, CONV3D, GROUPED1D, GROUPED2D, GROUPED3D, EMBEDDING]
DORAS = [DORA_LINEAR, DORA_CONV2D, DORA_EMBEDDING]
KINDS = [*SINGLE, ATTENTION, LLAMA, *DORAS, RSLORA, BIAS]

MIXERS = {
    "lora": {"mixer": "identity"},
    "learned": {"mixer": "learned"},
    "learned_orthogonal": {"mixer": "learned", "mixer_init": "orthogonal"},
    "learned_gaussian": {"mixer": "learned", "mixer_init": "gaussian"},
    "learned_identity": {"mixer": "learned", "mixer_init": "identity"},
    "frozen_orthogonal": {"mixer": "frozen", "mixer_init": "orthogonal"},
    "two_subspaces": {"mixer": "two_subspaces"},
}
# One that is trained, one that is not, and LoRA itself: for what does not depend on the start.
FEW_MIXERS = {name: MIXERS[name] for name in ("lora", "learned", "frozen_orthogonal")}


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def factors(layer: LoraLayer, adapter: str = "default") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The stored A, M and B of an adapted layer: leaves, as the optimiser sees them."""
    if adapter in layer.lora_embedding_A:
        return layer.lora_embedding_A[adapter], layer.lora_mixer[adapter], layer.lora_embedding_B[adapter]
    A, B = layer.lora_A[adapter], layer.lora_B[adapter]
    if hasattr(A, "mixer"):
        return A.raw, A.mixer, B.weight
    return A.weight, B.mixer, B.raw


@torch.no_grad()
def scramble(model: nn.Module, seed: int = 5, std: float = 0.3, adapter: str | None = None) -> nn.Module:
    """Gives every trainable tensor of the adapters (or of one) new values: a trained adapter, without the training."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name and (adapter is None or f".{adapter}." in f"{name}."):
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype))
            else:
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def train(model: nn.Module, x: torch.Tensor, steps: int = 3, lr: float = 0.05, optimizer=torch.optim.SGD) -> nn.Module:
    """Some steps towards a fixed random target; the model keeps its mode."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = optimizer(parameters, lr=lr)
    generator = torch.Generator().manual_seed(3)
    target = None
    for _ in range(steps):
        y = model(x)
        if target is None:
            target = torch.randn(y.shape, generator=generator, dtype=y.dtype)
        optimiser.zero_grad()
        (y - target).square().mean().backward()
        optimiser.step()
    return model
