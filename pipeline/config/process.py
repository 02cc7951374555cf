"""The sections of an experiment that say what is learned and how images come of it: network, diffusion process, sampling."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from pipeline.config.yaml_files import Section
from pipeline.errors import UsageError

TABLE = "table"  # the schedule that is given as a table of betas
MAX_TABLE_BYTES = 1 << 22

PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


# the settings that each kind of network of this package reads
_SHARED = {"channels", "channel_multipliers", "norm_groups"}
_READ_BY = {
    "unet": _SHARED
    | {
        "num_res_blocks",
        "attention_resolutions",
        "num_heads",
        "head_channels",
        "dropout",
        "norm_eps",
        "scale_shift_norm",
    }
    | {"flip_sin_to_cos", "freq_shift", "downsample_padding", "class_conditional"},
    "vae": _SHARED | {"latent_dim"},
}


def settings_of(kind: str) -> set[str]:
    """Return the settings that a type of network reads besides `type`."""
    return _READ_BY.get(kind, {"class_conditional"})


class ModelConfig(Section):
    """The network: the paper's U-Net, `package.module:Class` called with `arguments`, or `vae`, the model to compare with.

    The defaults are the U-Net of Ho et al. That of Nichol & Dhariwal has num_heads 4, scale_shift_norm, norm_eps 1e-5, flip_sin_to_cos,
    freq_shift 0 and downsample_padding 1. `head_channels`, where given, decides the number of heads instead of `num_heads`.
    """

    type: str = "unet"
    channels: PositiveInt = 128
    channel_multipliers: tuple[PositiveInt, ...] = Field(default=(1, 2, 2, 2), min_length=1)
    num_res_blocks: PositiveInt = 2
    attention_resolutions: tuple[PositiveInt, ...] = (16,)
    num_heads: PositiveInt = 1
    head_channels: PositiveInt | None = None
    dropout: Fraction = 0.1
    norm_groups: PositiveInt = 32
    norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    scale_shift_norm: bool = False
    flip_sin_to_cos: bool = False
    freq_shift: Literal[0, 1] = 1
    downsample_padding: Literal[0, 1] = 0
    class_conditional: bool = False
    latent_dim: PositiveInt = 16
    arguments: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_kind(self) -> ModelConfig:
        if self.head_channels is not None and self.num_heads != 1:
            raise ValueError("num_heads and head_channels both say how many heads there are; give one of them")
        if self.type in _READ_BY:
            if self.arguments:
                raise ValueError(
                    f"'arguments' belong to a network of your own; with type {self.type!r} set its keys directly"
                )
            self._refuse_unread(settings_of(self.type), "leave them out")
            return self
        module, colon, name = self.type.partition(":")
        parts = module.split(".")
        if not colon or not name.isidentifier() or not all(part.isidentifier() for part in parts):
            raise ValueError(f"type: got {self.type!r}; expected 'unet', 'vae' or 'package.module:Class'")
        self._refuse_unread(settings_of(self.type), f"give {self.type} its settings under 'arguments'")
        return self

    def _refuse_unread(self, read: set[str], what_to_do: str) -> None:
        """Refuse settings that this type of network would not read."""
        fields = type(self).model_fields
        unread = sorted(
            k for k in fields.keys() - read - {"type", "arguments"} if getattr(self, k) != fields[k].default
        )
        if unread:
            owner = next((kind for kind, keys in _READ_BY.items() if set(unread) <= keys), "unet")
            raise ValueError(f"{', '.join(unread)} belong to type {owner!r}; {what_to_do}")


class DiffusionConfig(Section):
    """The diffusion process, in the names of the `ddpm` package.

    A schedule is one of ddpm.SCHEDULES, or a table of betas: from `betas_file`, whose numbers are taken into `betas` when the
    experiment is read, so that a run carries them wherever it goes. Then schedule is 'table', and num_timesteps its length.
    """

    schedule: str = "linear"
    num_timesteps: Annotated[int, Field(ge=2)] = 1000
    zero_terminal_snr: bool = False
    betas_file: str | None = None
    betas: tuple[float, ...] | None = None
    prediction: Literal["eps", "x0", "v", "x_prev"] = "eps"
    variance: Literal["fixed_small", "fixed_large", "learned_range"] = "fixed_large"
    clip_x0: bool = True

    @model_validator(mode="before")
    @classmethod
    def _table_decides(cls, content: Any) -> Any:
        """A table of betas is the schedule, and its length is T, where these are not given."""
        if isinstance(content, dict) and isinstance(content.get("betas"), list | tuple):
            return {"schedule": TABLE, "num_timesteps": len(content["betas"])} | content
        return content

    @model_validator(mode="after")
    def _one_schedule(self) -> DiffusionConfig:
        if self.betas is None:
            if self.schedule == TABLE:
                raise ValueError("schedule 'table' needs its betas; give diffusion.betas_file, a text file of numbers")
            return self
        if self.schedule != TABLE:
            raise ValueError(f"schedule {self.schedule!r} and a table of betas are both given; leave one of them out")
        if self.num_timesteps != len(self.betas):
            raise ValueError(
                f"num_timesteps: got {self.num_timesteps}, but the table has {len(self.betas)} betas; leave num_timesteps out"
            )
        return self


def _as_text(value: object) -> str:
    """Class names are text: a number is one by its digits, but what was read as true or null has lost its spelling."""
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(text, str) or not text:
        raise ValueError(
            f"got {value!r}; expected the name of a class, '#balanced', '#none', or a number as '#3', quoted in YAML"
        )
    return text


class SamplingConfig(Section):
    """How images are generated. `batch_size` is the canonical chunk: files are byte-equal only for an equal one.

    `steps` is 50 where nothing is said, and all T with the ancestral sampler; null is all T with any. `eta` is ddim's alone.
    `guidance_scale` is s = 1 + w of classifier-free guidance: 1 is none. `labels` says of which class image i is, where the model
    knows classes: "#balanced" (the classes in turn), "#none", or one class by name, or by number as "#3".
    `precision` is the network's arithmetic, weights included; x_t and the sampler's own are float32. `mixed` is bf16 on GPUs from Ampere on
    and on CPUs with instructions for it, else fp32.
    """

    sampler: Literal["ddim", "ancestral", "dpm_solver"] = "ddim"
    steps: PositiveInt | None = 50
    spacing: Literal["trailing", "linspace", "leading", "quad"] = "trailing"
    eta: Annotated[float, Field(ge=0, le=1)] = 0.0
    guidance_scale: Annotated[float, Field(ge=0)] = 1.0
    labels: Annotated[str, BeforeValidator(_as_text)] = "#balanced"
    batch_size: PositiveInt = 32
    precision: Literal["mixed", "bf16", "fp32"] = "mixed"
    compile: bool = False

    @model_validator(mode="before")
    @classmethod
    def _ancestral_takes_all_steps(cls, content: Any) -> Any:
        """Algorithm 2 goes over all T steps unless told otherwise, in a file as on the command line."""
        if isinstance(content, dict) and content.get("sampler") == "ancestral":
            return {"steps": None} | content
        return content

    def num_steps(self, num_timesteps: int) -> int:
        """Return the timesteps asked for along one image: `steps`, or all T of them."""
        return min(self.steps or num_timesteps, num_timesteps)


def take_in_betas(content: dict[str, Any], base: Path) -> None:
    """Read the file that `diffusion.betas_file` names, relative to `base`, and put its numbers beside it; UsageError if it cannot be."""
    diffusion = content.get("diffusion")
    if not isinstance(diffusion, dict) or diffusion.get("betas_file") is None or diffusion.get("betas") is not None:
        return  # a resolved experiment holds the numbers already
    path = base / Path(str(diffusion["betas_file"])).expanduser()
    diffusion["betas"] = read_betas(path)
    diffusion["betas_file"] = path.name


def read_betas(path: Path) -> list[float]:
    """Return the numbers of a text file: separated by white space, commas or lines, or a JSON list; `#` begins a comment."""
    try:
        if path.stat().st_size > MAX_TABLE_BYTES:
            raise UsageError(f"{path}: too large for a table of betas; give a text file with one number per step")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"diffusion.betas_file: {path} cannot be read ({error.strerror}); give a text file with one number per step"
        ) from None
    except UnicodeDecodeError:
        raise UsageError(f"diffusion.betas_file: {path} is not text; write one number per step") from None
    lines = [line.partition("#")[0] for line in text.splitlines()]
    words = " ".join(lines).replace(",", " ").strip().removeprefix("[").removesuffix("]").split()
    betas: list[float] = []
    for word in words:
        try:
            betas.append(float(word))
        except ValueError:
            raise UsageError(f"diffusion.betas_file: {path} holds {word!r}; expected numbers, one per step") from None
    if len(betas) < 2:
        raise UsageError(f"diffusion.betas_file: {path} holds {len(betas)} numbers; expected one per step, at least 2")
    return betas
