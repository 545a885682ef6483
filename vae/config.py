"""What a model and a training run are made of: frozen, complete, checked before any work.

Standard library only, so that a command line can check a configuration without loading torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, get_args, get_origin, get_type_hints

# The allowlist: the `model` tag -> where its configuration and its class are.
# A bundle or a checkpoint is built from these names and from nothing else.
MODELS: dict[str, tuple[str, str]] = {
    "flat": ("vae.config:FlatConfig", "vae.flat:FlatVAE"),
    "autoencoder": ("vae.config:AutoencoderConfig", "vae.autoencoder:Autoencoder"),
    "ladder": ("vae.config:LadderConfig", "vae.ladder:LadderVAE"),
}

LikelihoodName = Literal[
    "bernoulli",
    "continuous_bernoulli",
    "gaussian",
    "optimal_gaussian",
    "discretized_logistic",
    "discretized_logistic_mixture",
]


def check_choice(field: str, value: str, choices: Iterable[str]) -> None:
    """Refuse a value outside its choices, naming the nearest.

    >>> check_choice("prior", "norml", ["normal", "vamp"])
    Traceback (most recent call last):
    ValueError: prior='norml' is not one of 'normal', 'vamp': did you mean 'normal'?
    """
    choices = list(choices)
    if value not in choices:
        raise ValueError(no_choice(field, value, choices))


def no_choice(field: str, value: object, choices: list[str]) -> str:
    """The message that refuses a value outside its choices."""
    return f"{field}={value!r} is not one of {', '.join(map(repr, choices))}{_nearest(str(value), choices)}"


def check_range(field: str, value: float, low: float, high: float = float("inf")) -> None:
    """Refuse a number outside [low, high] (NaN is outside every range)."""
    if not low <= value <= high:
        raise ValueError(f"{field}={value!r} must be in [{low:g}, {high:g}]")


def _nearest(name: str, valid: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f": did you mean {close[0]!r}?" if close else ""


def _freeze(value: Any) -> Any:
    """JSON and TOML have lists where a frozen configuration has tuples."""
    return tuple(map(_freeze, value)) if isinstance(value, list | tuple) else value


@dataclass(frozen=True, kw_only=True)
class Config:
    """A frozen record that goes to JSON and back, and refuses what it doesn't know."""

    def to_dict(self) -> dict[str, Any]:
        """Every field, defaults included."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The configuration of these fields; an unknown one is a ValueError with the nearest valid name.

        >>> TrainConfig.from_dict({"epoch": 3})
        Traceback (most recent call last):
        ValueError: unknown field 'epoch' of TrainConfig: did you mean 'epochs'?
        """
        valid = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in valid:
                raise ValueError(f"unknown field {name!r} of {cls.__name__}{_nearest(name, valid)}")
        required = [
            f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING
        ]
        for name in required:
            if name not in values:
                raise ValueError(f"{cls.__name__} needs a value for {name!r}")
        return cls(**{name: _freeze(value) for name, value in values.items()})

    def _check_types(self) -> None:
        """JSON and TOML are untyped: refuse a string for a number, or no choice, here, not deep in torch."""
        accepted = {int: (int,), float: (int, float), bool: (bool,)}
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value, wanted = getattr(self, field.name), hints[field.name]
            if get_origin(wanted) is Literal:
                check_choice(field.name, value, get_args(wanted))
            elif wanted in accepted and type(value) not in accepted[wanted]:
                raise ValueError(f"{field.name}={value!r} must be of type {wanted.__name__}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Config):
    """What every model of images states: the geometry of x and the likelihood p(x|z).

    binarize says what a Bernoulli likelihood does with grey pixels: 'threshold' (above 127 is 1) or
    'sampled' (1 with probability x/255; drawn anew each training step, fixed by id in evaluation).
    The encoder sees the same binarised pixels. components counts the logistics of a mixture.
    """

    model: ClassVar[str]

    height: int
    width: int
    channels: int
    likelihood: LikelihoodName = "discretized_logistic"
    components: int = 5
    binarize: Literal["none", "threshold", "sampled"] = "none"

    def __post_init__(self) -> None:
        self._check_types()
        for side in ("height", "width"):
            check_range(side, getattr(self, side), 8, 256)
        if self.channels not in (1, 3):
            raise ValueError(f"channels={self.channels!r} must be 1 (grey) or 3 (RGB)")
        check_range("components", self.components, 1, 100)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        return self.channels, self.height, self.width

    def to_dict(self) -> dict[str, Any]:
        """Every field and the model's tag."""
        return {"model": self.model, **super().to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The fields with or without the model's tag; another model's tag is refused."""
        values = dict(values)
        tag = values.pop("model", cls.model)
        if tag != cls.model:
            raise ValueError(f"model={tag!r} is not {cls.model!r}, which {cls.__name__} describes")
        return super().from_dict(values)


def _default_hidden(network: str, height: int, width: int) -> tuple[int, ...]:
    """MLP: one wide layer. Convolution: halve the longer side to 4 pixels or fewer, doubling channels."""
    if network == "mlp":
        return (400,)
    stages = max(1, (max(height, width) - 1).bit_length() - 2)
    return tuple(min(16 * 2**stage, 256) for stage in range(stages))


@dataclass(frozen=True, kw_only=True)
class NetworkConfig(ModelConfig):
    """The encoder and the decoder that mirrors it, shared by the flat models.

    network: 'conv' (convolution and max pooling), 'strided', 'residual', 'mlp'.
    hidden: channels of each halving stage, or sizes of the MLP's layers; None chooses by geometry,
    () is a linear MLP. upsampling: how the decoder of 'conv' mirrors pooling.
    """

    latent_dim: int = 32
    network: Literal["conv", "strided", "residual", "mlp"] = "conv"
    hidden: tuple[int, ...] | None = None
    upsampling: Literal["transposed", "unpool"] = "transposed"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("latent_dim", self.latent_dim, 1, 65536)
        if self.hidden is None:
            object.__setattr__(self, "hidden", _default_hidden(self.network, self.height, self.width))
        if not isinstance(self.hidden, tuple) or not all(type(h) is int and h > 0 for h in self.hidden):
            raise ValueError(f"hidden={self.hidden!r} must be positive whole numbers")
        if not self.hidden and self.network != "mlp":
            raise ValueError(
                f"hidden=() is a linear network, which needs network='mlp', not {self.network!r}"
            )


@dataclass(frozen=True, kw_only=True)
class FlatConfig(NetworkConfig):
    """The VAE with one latent vector (Kingma & Welling 2014).

    prior: 'normal', or 'vamp' (Tomczak & Welling 2018) with its number of pseudo_inputs.

    >>> config = FlatConfig(height=28, width=28, channels=1)
    >>> config.hidden
    (16, 32, 64)
    >>> model_config(config.to_dict()) == config
    True
    """

    model: ClassVar[str] = "flat"

    prior: Literal["normal", "vamp"] = "normal"
    pseudo_inputs: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("pseudo_inputs", self.pseudo_inputs, 1, 10_000)


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig(NetworkConfig):
    """The deterministic autoencoder, the baseline: a code and its reconstruction, no prior.

    corruption: what the input suffers while the target stays clean. 'noise' adds a Gaussian of
    standard deviation `corruption_strength` (in units of the full range 0..1); 'downscale' shrinks by
    the whole factor `corruption_strength` and enlarges again, so that decoding upscales.
    """

    model: ClassVar[str] = "autoencoder"

    corruption: Literal["none", "noise", "downscale"] = "none"
    corruption_strength: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = {"none": (0, 0), "noise": (1e-6, 10), "downscale": (2, 64)}[self.corruption]
        check_range(
            f"corruption_strength (corruption={self.corruption!r})", self.corruption_strength, low, high
        )
        if self.corruption == "downscale" and self.corruption_strength != int(self.corruption_strength):
            raise ValueError(f"corruption_strength={self.corruption_strength!r} must be whole to downscale")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """How to train, whatever the model.

    epochs: passes over the training images; more of them, where the images are few, until min_steps steps are
    taken. batch_size in images, worked on in parts of micro_batch (0: whole, until memory does not suffice).
    acceleration: on a GPU, 'graph' records a step and replays it; 'compile' is torch.compile, on any device.
    precision: 'float32', 'bfloat16' for matrix products alone, or 'auto' (bfloat16 on a GPU that has it).
    shuffle_mib: pixels shuffled at once, of a set that has more. flip, shift: augmentation, each image
    mirrored every other time, and moved by up to so many pixels either way.
    learning_rate is Adam's, held ('constant') or taken to zero along half a cosine ('cosine', Loshchilov &
    Hutter 2017) by learning_rate_schedule, after a linear rise over the first learning_rate_warmup_epochs.
    A step whose gradient's norm is not finite, or above gradient_skip times its running average, is left
    out; one above gradient_clip times it is shortened to that (0: none is). ema_decay, if not 0: the decay a
    step of the weights' moving average, which is then what is validated and kept. The loss is the negative
    ELBO with
    - beta: the KL's final weight (Higgins et al. 2017), reached by beta_schedule: 'constant',
      'warmup' (linear over the first warmup_epochs) or 'cyclic' (Fu et al. 2019: `cycles` ramps);
    - free_bits: nats that each latent level may use at no cost (Kingma et al. 2016);
    - kl_balancing: levels that carry much pay more while beta is below its final value (Vahdat & Kautz 2020);
    or, with objective='iwae', the bound of `samples` importance samples (Burda et al. 2016), its
    gradient 'dreg', doubly reparameterized (Tucker et al. 2018), or 'plain'.
    patience: epochs without a better validation ELBO after which training stops, with the best weights (0:
    never). rollbacks: how often training may go back to its last checkpoint, with half the learning rate,
    after a loss that is not finite. log_every and checkpoint_every count steps; a checkpoint is also taken
    at the end.
    """

    epochs: int = 20
    min_steps: int = 0
    batch_size: int = 128
    learning_rate: float = 2e-3
    learning_rate_schedule: Literal["constant", "cosine"] = "constant"
    learning_rate_warmup_epochs: float = 0.0
    gradient_skip: float = 20.0
    gradient_clip: float = 0.0
    ema_decay: float = 0.0
    micro_batch: int = 0
    acceleration: Literal["none", "graph", "compile"] = "none"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    shuffle_mib: int = 256
    flip: bool = False
    shift: int = 0
    patience: int = 0
    rollbacks: int = 3
    seed: int = 0
    objective: Literal["elbo", "iwae"] = "elbo"
    samples: int = 1
    gradient: Literal["dreg", "plain"] = "dreg"
    beta: float = 1.0
    beta_schedule: Literal["constant", "warmup", "cyclic"] = "constant"
    warmup_epochs: float = 0.0
    cycles: int = 4
    free_bits: float = 0.0
    kl_balancing: bool = False
    log_every: int = 50
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        self._check_types()
        counts = ("epochs", "batch_size", "samples", "cycles", "shuffle_mib", "log_every", "checkpoint_every")
        for name in counts:
            check_range(name, getattr(self, name), 1)
        for name in ("min_steps", "micro_batch", "patience", "rollbacks"):
            check_range(name, getattr(self, name), 0)
        check_range("shift", self.shift, 0, 64)
        for name in ("beta", "warmup_epochs", "free_bits", "learning_rate_warmup_epochs"):
            check_range(name, getattr(self, name), 0, 1e6)
        check_range("ema_decay", self.ema_decay, 0, 0.99999)
        for name in ("gradient_skip", "gradient_clip"):
            if getattr(self, name) != 0:
                check_range(f"{name} (0 for none)", getattr(self, name), 1)
        check_range("learning_rate", self.learning_rate, 1e-12, 10)
        check_range("seed", self.seed, 0, 2**63 - 1)
        self._check_objective()

    def for_images(self, count: int) -> TrainConfig:
        """The configuration for so many images: with min_steps met by more epochs, warm-ups stretched alike.

        >>> few = TrainConfig(epochs=2, min_steps=100, batch_size=64, learning_rate_warmup_epochs=0.5)
        >>> few = few.for_images(640)
        >>> few.epochs, few.min_steps, few.learning_rate_warmup_epochs
        (10, 0, 2.5)
        """
        epochs = max(self.epochs, math.ceil(self.min_steps / math.ceil(count / self.batch_size)))
        stretch = epochs / self.epochs
        return dataclasses.replace(
            self,
            epochs=epochs,
            min_steps=0,
            warmup_epochs=self.warmup_epochs * stretch,
            learning_rate_warmup_epochs=self.learning_rate_warmup_epochs * stretch,
        )

    def _check_objective(self) -> None:
        """A setting that would silently do nothing is refused."""
        weighted = self.beta != 1 or self.beta_schedule != "constant" or self.free_bits or self.kl_balancing
        if self.objective == "iwae" and weighted:
            raise ValueError(
                "objective='iwae' is a bound on log p(x): it takes no beta, schedule, free_bits or balancing"
            )
        if self.acceleration == "graph" and self.beta_schedule != "constant":
            raise ValueError(
                f"acceleration='graph' records one beta, and beta_schedule={self.beta_schedule!r} has many"
            )
        if self.objective == "elbo" and self.samples != 1:
            raise ValueError(
                f"samples={self.samples} needs objective='iwae': the ELBO is trained with one sample"
            )
        if self.kl_balancing and self.beta_schedule == "constant":
            raise ValueError(
                "kl_balancing acts while beta rises: it needs beta_schedule='warmup' or 'cyclic'"
            )
        if (self.beta_schedule == "warmup") != (self.warmup_epochs > 0):
            raise ValueError(
                f"beta_schedule={self.beta_schedule!r} does not fit warmup_epochs={self.warmup_epochs:g}: "
                "a warm-up needs both"
            )


def _resolve(path: str) -> Any:
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)


def model_config(values: Mapping[str, Any]) -> ModelConfig:
    """The configuration that a dictionary with a `model` tag describes, by the allowlist.

    >>> model_config({"model": "flta", "height": 28, "width": 28, "channels": 1})
    Traceback (most recent call last):
    ValueError: model='flta' is not one of 'flat', ...: did you mean 'flat'?
    """
    config: ModelConfig = config_class(values.get("model", "flat")).from_dict(values)
    return config


def config_class(tag: str) -> type[ModelConfig]:
    """The configuration class of a model family, by the allowlist."""
    check_choice("model", tag, MODELS)
    found: type[ModelConfig] = _resolve(MODELS[tag][0])
    return found


def model_class(config: ModelConfig) -> Any:
    """The class that builds this configuration's model, imported (with torch) only here."""
    check_choice("model", config.model, MODELS)
    return _resolve(MODELS[config.model][1])


@dataclass(frozen=True, kw_only=True)
class LadderConfig(ModelConfig):
    """The hierarchical VAE: stages of falling resolution, each with levels of spatial latents.

    One entry a stage, finest first. strides: how many times smaller than the stage before (the image, for
    the first), rounding up; hidden: feature channels; levels: stochastic levels, 0 for features alone;
    latents: latent channels of each of its levels. () chooses by geometry. blocks: residual blocks
    before each level, on either path. overlap: a patch of the larger stage is made from the features of its
    neighbours too, not from its own alone.

    >>> config = LadderConfig(height=28, width=28, channels=1)
    >>> config.strides, config.levels
    ((4, 7), (1, 1))
    """

    model: ClassVar[str] = "ladder"

    strides: tuple[int, ...] = ()
    hidden: tuple[int, ...] = ()
    levels: tuple[int, ...] = ()
    latents: tuple[int, ...] = ()
    blocks: int = 1
    overlap: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("blocks", self.blocks, 1, 16)
        for name, default in _default_ladder(self.height, self.width).items():
            if getattr(self, name) == ():
                object.__setattr__(self, name, default)
            self._check_stages(name)
        if not sum(self.levels):
            raise ValueError(f"levels={self.levels!r}: a ladder needs a stochastic level in some stage")

    def _check_stages(self, name: str) -> None:
        value = getattr(self, name)
        low = 0 if name == "levels" else 1
        if not isinstance(value, tuple) or not all(type(v) is int and v >= low for v in value):
            raise ValueError(f"{name}={value!r} must be whole numbers of {low} or more, one a stage")
        if len(value) != len(self.strides):
            raise ValueError(f"{name}={value!r} has {len(value)} stages and strides={self.strides!r} has not")


def _default_ladder(height: int, width: int) -> dict[str, tuple[int, ...]]:
    """Quarter the image, halve it while its longer side is 9 or more, and end in one vector."""
    side = math.ceil(max(height, width) / 4)
    strides = [4]
    while side > 8:
        side = math.ceil(side / 2)
        strides.append(2)
    stages = len(strides) + 1
    return {
        "strides": (*strides, max(side, 2)),
        "hidden": (*(min(32 * 2**stage, 128) for stage in range(stages - 1)), 128),
        "levels": (1,) * stages,
        "latents": (4,) * (stages - 1) + (32,),
    }
