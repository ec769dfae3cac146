"""A plain top-k sparse autoencoder and its files.

They are those of EleutherAI's sparsify (`cfg.json` and `sae.safetensors` in a folder named like `layers.8.mlp`), so the
autoencoders of the SAE-LAPE study load as they are; what this package writes says besides, in the header of the
weights, which layer is read and how the autoencoder was made.
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lens_neurons.errors import ModelError, StorageError
from lens_neurons.storage import SCHEMA, load_json, load_tensors, require_kind, save_json, save_tensors

KIND = "sae"
WEIGHTS_FILE = "sae.safetensors"
CONFIG_FILE = "cfg.json"

# The names of the tensors in a file of sparsify, and ours.
_FILE_NAMES = {"encoder.weight": "w_enc", "encoder.bias": "b_enc", "W_dec": "w_dec", "b_dec": "b_dec"}

# What sparsify can do besides; its weights alone then do not say what a latent is.
_OTHER_KINDS = ("signed", "transcode", "skip_connection", "embed_skip", "gram_lookup")


@dataclass(frozen=True, eq=False)
class TopKSAE:
    """A top-k sparse autoencoder: z = topk(relu(W_enc (x - b_dec) + b_enc)), x' = W_dec^T z + b_dec.

    Source: Gao et al. 2024 (arXiv 2406.04093), as EleutherAI's sparsify has it.

    Attributes:
        w_enc: Encoder.
        b_enc: Its bias.
        w_dec: Decoder: one row a latent, the direction it writes.
        b_dec: Its bias, which is taken off the input too.
        k: How many latents are kept for each input.
        layer: Layer that it reads, None where that is not known.
        site: Where in the layer: "mlp_out", another site, or "resid_post" and the like.
        notes: How it was made: model, text, settings, figures.
    """

    w_enc: Float[Tensor, "latent d_in"]
    b_enc: Float[Tensor, " latent"]
    w_dec: Float[Tensor, "latent d_in"]
    b_dec: Float[Tensor, " d_in"]
    k: int
    layer: int | None = None
    site: str = "mlp_out"
    notes: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        """Check that k fits and that every weight is finite.

        Raises:
            ModelError: Either is not so.
        """
        if not 1 <= self.k <= self.n_latents:
            raise ModelError(f"an SAE of {self.n_latents} latents cannot keep k={self.k} of them; give 1 to all.")
        for name in _FILE_NAMES.values():
            if not bool(torch.isfinite(getattr(self, name)).all()):
                raise ModelError(f"the SAE's {name} holds NaN or infinite values; load or train it again.")

    @property
    def n_latents(self) -> int:
        """Number of latents."""
        return self.w_enc.shape[0]

    @property
    def d_in(self) -> int:
        """Width of what it reads."""
        return self.w_enc.shape[1]

    def __repr__(self) -> str:
        """Return sizes and place."""
        place = "no layer" if self.layer is None else f"layer {self.layer}"
        return f"TopKSAE({self.d_in} -> {self.n_latents} latents, k={self.k}, {self.site} of {place})"

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch latent"]:
        """Return the latents of some inputs: the k largest of each, as far as they are above 0, and zeros."""
        before = torch.nn.functional.linear(x - self.b_dec, self.w_enc, self.b_enc).relu()
        values, index = before.topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(before).scatter_(-1, index, values)

    def decode(self, latents: Float[Tensor, "*batch latent"]) -> Float[Tensor, "*batch d_in"]:
        """Return the input that some latents stand for."""
        return latents @ self.w_dec + self.b_dec

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "TopKSAE":
        """Return the same on another device, or in another data type."""
        moved = {name: getattr(self, name).to(device, dtype) for name in _FILE_NAMES.values()}
        return dataclasses.replace(self, **moved)

    def save(self, path: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> None:
        """Write the weights, and how they are to be read, to a folder in sparsify's layout, or to one .safetensors.

        Args:
            path: A folder, made where it is missing, or a file that ends in .safetensors.
            dtype: Data type of the weights in the file.
        """
        config = {
            "activation": "topk",
            "d_in": self.d_in,
            "expansion_factor": max(1, self.n_latents // self.d_in),
            "k": self.k,
            "normalize_decoder": True,
            "num_latents": self.n_latents,
        }
        header = {"kind": KIND, "schema": SCHEMA, "config": config, "notes": dict(self.notes)}
        header |= {"layer": self.layer, "site": self.site}
        target = Path(path)
        weights = {stored: getattr(self, name).to(dtype) for stored, name in _FILE_NAMES.items()}
        if target.suffix == ".safetensors":
            save_tensors(target, weights, header)
            return
        save_tensors(target / WEIGHTS_FILE, weights, header)
        save_json(target / CONFIG_FILE, config)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, layer: int | None = None, site: str | None = None) -> "TopKSAE":
        """Return the SAE in a folder or file of this package, or in a folder of sparsify such as `layers.8.mlp`.

        Args:
            path: A folder with `sae.safetensors` and `cfg.json`, or a .safetensors file.
            layer: Layer that it reads; default: what the file, or the folder's name, says.
            site: Likewise.

        Raises:
            ModelError: A file is absent, damaged, or holds no top-k SAE.
        """
        source = Path(path).expanduser()
        file = source / WEIGHTS_FILE if source.is_dir() else source
        weights, header = _read(file)
        config = header.get("config")
        if config is None:
            config = _json(file.parent / CONFIG_FILE)
        found_site, found_layer = _place_of_folder(file.parent.name)
        made = cls(
            **_float32(file, weights),
            k=_k_of(file, config),
            layer=layer if layer is not None else header.get("layer", found_layer),
            site=site or header.get("site") or found_site or "mlp_out",
            notes=header.get("notes", {}),
        )
        sizes = [("d_in", made.d_in), ("num_latents", made.n_latents)]
        for name, size in sizes:
            if config.get(name) not in (None, 0, size):
                raise ModelError(f"{file} has {name} {size}, but its configuration says {config[name]}; get it again.")
        return made


def _place_of_folder(name: str) -> tuple[str | None, int | None]:
    """Return site and layer as sparsify names folders: "layers.8.mlp", or "layers.8" for what leaves the block."""
    found = re.fullmatch(r"(?:.*\.)?(?:layers|h)\.(\d+)(\.mlp)?", name)
    return (None, None) if found is None else ("mlp_out" if found[2] else "resid_post", int(found[1]))


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a file, and its header where this package wrote it."""
    if not file.is_file():
        raise ModelError(f"{file} does not exist; give a folder with {WEIGHTS_FILE}, or a .safetensors file.")
    try:
        with safe_open(file, framework="pt") as stream:  # pyright: ignore[reportUnknownVariableType]
            ours = "lens_neurons" in (stream.metadata() or {})
        if not ours:
            return safetensors.torch.load_file(file), {}
        weights, header = load_tensors(file)
        require_kind(file, header, KIND)
    except (SafetensorError, StorageError, OSError) as error:
        raise ModelError(f"{file} cannot be read as an SAE ({error}); get it again.") from None
    return weights, header


def _json(file: Path) -> dict[str, Any]:
    try:
        config = load_json(file)
    except StorageError as error:
        raise ModelError(f"an SAE needs a {CONFIG_FILE} beside its weights: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{file} is not the configuration of an SAE; give the folder of one.")
    return config


def _float32(file: Path, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if set(weights) != set(_FILE_NAMES):
        raise ModelError(f"{file} holds {sorted(weights)}, but an SAE has {sorted(_FILE_NAMES)}; give another file.")
    made = {name: weights[stored].float() for stored, name in _FILE_NAMES.items()}
    latents, d_in = made["w_enc"].shape if made["w_enc"].ndim == 2 else (0, 0)
    expected = {"w_enc": (latents, d_in), "b_enc": (latents,), "w_dec": (latents, d_in), "b_dec": (d_in,)}
    wrong = {name: tuple(made[name].shape) for name in expected if tuple(made[name].shape) != expected[name]}
    if wrong or not latents:
        raise ModelError(f"{file} has weights of shapes that do not go together ({wrong or made}); get it again.")
    return made


def _k_of(file: Path, config: Mapping[str, Any]) -> int:
    kind, k = config.get("activation", "topk"), config.get("k")
    others = [name for name in _OTHER_KINDS if config.get(name)]
    if kind != "topk" or others or not isinstance(k, int):
        what = ", ".join([str(kind), *others]) if others or kind != "topk" else f"k={k!r}"
        raise ModelError(f"{file} is not a plain top-k SAE ({what}); load it with its own library and pass the object.")
    return k
