"""Tables of average precision as Kojima et al.'s code writes them, made here from plain Hugging Face models."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from models import tiny
from oracle import padded, sentence
from sklearn.metrics import average_precision_score

from lens_neurons.errors import DataError, SettingError, StorageError
from lens_neurons.model import adapt, load_model
from lens_neurons.neurons import NeuronSet
from lens_neurons.precision_tables import read_precision_table

TEXTS = {
    code: [
        torch.randint(4, 384, (6 + i,), generator=torch.Generator().manual_seed(100 * k + i)).tolist() for i in range(5)
    ]
    for k, code in enumerate(("de", "ja"))
}


@torch.no_grad()
def write_expertise(folder: Path, hf_model: Any) -> dict[str, Path]:
    """Write what KOJ:selfcond/expertise.py does: one file a language, all units of all linear layers by module name."""
    responses: dict[str, list[np.ndarray]] = {}

    def catch(name: str) -> Any:
        # The mean over the tokens of one text, without padding.
        return lambda _module, _inputs, output: responses.setdefault(f"{name}:0", []).append(output[0].mean(0).numpy())

    handles = [
        module.register_forward_hook(catch(name))
        for name, module in hf_model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    for texts in TEXTS.values():
        for text in texts:
            hf_model(torch.tensor([text]))
    for handle in handles:
        handle.remove()
    owners = np.array([code for code, texts in TEXTS.items() for _ in texts])
    paths: dict[str, Path] = {}
    for code in TEXTS:
        parts = []
        for name in sorted(responses):
            values = np.stack(responses[name])
            positive = values[owners == code]
            parts.append(
                pd.DataFrame(
                    {
                        "ap": [average_precision_score(owners == code, column) for column in values.T],
                        "off_mean": values[owners != code].mean(axis=0),
                        "on_p50": np.percentile(positive, 50, axis=0),
                        "on_p90": np.percentile(positive, 90, axis=0),
                        "layer": name,
                        "unit": np.arange(values.shape[1], dtype=np.uint32),
                    }
                )
            )
        frame = pd.concat(parts, ignore_index=True)
        frame["uuid"], frame["concept"], frame["group"] = np.arange(len(frame)), code, "sense"
        paths[code] = folder / f"{code}-expertise.csv"
        frame.to_csv(paths[code], index=False)
    return paths


@pytest.mark.bridge
@pytest.mark.parametrize("arch", ["bloom", "neox"])
def test_published_medians_are_those_of_the_sites(arch: str, tmp_path: Path):
    made = tiny(arch)
    paths = write_expertise(tmp_path, made.hf_model)
    model = load_model(made.folder, backend="bridge", device="cpu")
    table = read_precision_table(paths, model)
    assert table.languages == ("de", "ja")
    assert table.notes == ("768 rows of 'lm_head:0', which is in no block, were left out",)
    units = sum(n * width for n, width in table.sites.values())
    assert len(table.frame) == 2 * units
    adapter = adapt(model)
    means = {
        code: [adapter.cache_sites(*padded([text], "right"), table.sites) for text in texts]
        for code, texts in TEXTS.items()
    }
    for code, caches in means.items():
        for site, (n_layers, width) in table.sites.items():
            rows = torch.stack(
                [
                    torch.stack([cache[site, layer].reshape(-1, width).mean(0) for layer in range(n_layers)])
                    for cache in caches
                ]
            )
            assert torch.allclose(table.values(code, site), rows.median(dim=0).values, atol=2e-5)
            off = table.values(code, site, "off_mean")
            assert not off.isnan().any()
            precision = table.values(code, site, "ap").double()
            others = torch.stack(
                [
                    torch.stack([cache[site, layer].reshape(-1, width).mean(0) for layer in range(n_layers)])
                    for cache in means["ja" if code == "de" else "de"]
                ]
            )
            # One unit of every site and layer by hand; texts whose responses nearly tie may change places.
            for layer in range(n_layers):
                values = torch.cat([rows[:, layer, 3], others[:, layer, 3]]).numpy()
                wanted = average_precision_score([1] * 5 + [0] * 5, values)
                assert float(precision[layer, 3]) == pytest.approx(wanted, abs=1e-6)


def small(**changes: Any) -> pd.DataFrame:
    columns = {
        "ap": [0.9, 0.1, 0.9, 0.5, 0.3, 0.1],
        "layer": ["transformer.h.0.self_attention.query_key_value:0"] * 3 + ["transformer.h.1.mlp.dense_h_to_4h:0"] * 3,
        "unit": [9, 0, 8, 5, 6, 7],
        "on_p50": [1.5, -2.0, 0.25, 0.0, 3.0, 4.0],
        "concept": "deu_Latn",
    }
    return pd.DataFrame({**columns, **changes})


def config() -> Any:
    return tiny("bloom").hf_model.config


def listed(neurons: NeuronSet, code: str) -> list[tuple[str, int, int, str, float]]:
    rows = neurons[code].to_frame()
    return list(rows[["site", "layer", "neuron", "kind", "score"]].itertuples(index=False, name=None))


def test_a_set_of_the_top_and_the_bottom(tmp_path: Path):
    small().to_csv(tmp_path / "expertise.csv", index=False)
    table = read_precision_table(tmp_path / "expertise.csv", config(), ends="all")
    assert table.languages == ("de",)
    assert list(table.frame.columns) == ["language", "site", "layer", "neuron", "ap", "on_p50"]
    # Units 8 and 9 of the fused layer are k 0 and 1 of head 0; equal precisions go by site, layer, index.
    assert listed(table.neurons(k=4), "de") == [
        ("k", 0, 0, "top", 0.9),
        ("k", 0, 1, "top", 0.9),
        ("q", 0, 0, "bottom", 0.1),
        ("gate_pre", 1, 7, "bottom", 0.1),
    ]
    assert [row[:3] for row in listed(table.neurons(k=3, which="top"), "de")] == [
        ("k", 0, 0),
        ("k", 0, 1),
        ("gate_pre", 1, 5),
    ]
    assert [row[:3] for row in listed(table.neurons(k=1, which="bottom"), "de")] == [("q", 0, 0)]
    assert table.neurons(k=2).method["published"] == ["expertise.csv"]
    values = table.values("de", "k")
    assert values[0, :2].tolist() == [0.25, 1.5]
    assert int((~values.isnan()).sum()) == 2


def test_equal_precisions_make_no_unit_top_and_bottom(tmp_path: Path):
    small(ap=0.5).to_csv(tmp_path / "t.csv", index=False)
    neurons = read_precision_table(tmp_path / "t.csv", config(), ends="both").neurons(k=6)
    assert neurons.counts() == {"de": 6}
    assert [kind for *_, kind, _ in listed(neurons, "de")] == ["top"] * 3 + ["bottom"] * 3


def test_an_end_that_the_table_lacks_is_refused(tmp_path: Path):
    def read(name: str, frame: pd.DataFrame | None = None, **settings: Any) -> Any:
        (small() if frame is None else frame).to_csv(tmp_path / name, index=False)
        return read_precision_table(tmp_path / name, config(), **settings)

    top, bottom = read("expertise_limited_6_top.csv"), read("t.csv", ends="bottom")
    both, unsaid = read("expertise_limited_6_both.csv"), read("expertise.csv")
    assert top.neurons(k=6, which="top").counts() == bottom.neurons(k=6, which="bottom").counts() == {"de": 6}
    assert both.neurons(k=6).counts() == {"de": 6}
    assert both.neurons(k=3, which="top").counts() == {"de": 3}
    # One of the top is outside the blocks, so that the half of what is left is no top any more.
    frame = small()
    frame.loc[0, "layer"] = "lm_head:0"
    short = read("expertise_limited_6_both.csv", frame)
    assert short.left_out == {"de": 1}
    assert short.neurons(k=2, which="top").counts() == {"de": 2}
    cases = [
        ("0 rows at the bottom", lambda: top.neurons(k=4)),
        ("0 rows at the bottom", lambda: top.neurons(k=1, which="bottom")),
        ("0 rows at the top", lambda: bottom.neurons(k=4)),
        ("3 rows at the top", lambda: both.neurons(k=4, which="top")),
        ("2 rows at the top", lambda: short.neurons(k=3, which="top")),
        ("which are not all units", lambda: unsaid.neurons(k=1, which="top")),
        ("ends='middle' is unknown", lambda: read("t.csv", ends="middle")),
    ]
    for text, call in cases:
        with pytest.raises((DataError, SettingError), match=text) as caught:
            call()
        sentence(caught.value)


def test_all_units_of_a_site_are_a_ranking(tmp_path: Path):
    small().to_csv(tmp_path / "t.csv", index=False)
    layers, units = read_precision_table(tmp_path / "t.csv", config()).sites["gate_pre"]
    frame = pd.DataFrame(
        {
            "layer": [f"transformer.h.{n}.mlp.dense_h_to_4h:0" for n in range(layers) for _ in range(units)],
            "unit": list(range(units)) * layers,
            "ap": np.linspace(0, 1, layers * units),
            "concept": "de",
        }
    )
    frame.to_csv(tmp_path / "all.csv", index=False)
    neurons = read_precision_table(tmp_path / "all.csv", config()).neurons(k=2)
    assert [row[:4] for row in listed(neurons, "de")] == [
        ("gate_pre", layers - 1, units - 1, "top"),
        ("gate_pre", 0, 0, "bottom"),
    ]
    frame[:-1].to_csv(tmp_path / "all.csv", index=False)
    with pytest.raises(DataError, match="not all units"):
        read_precision_table(tmp_path / "all.csv", config()).neurons(k=2)


def test_other_columns(tmp_path: Path):
    frame = small().rename(columns={"layer": "module", "ap": "score", "unit": "neuron"}).drop(columns="concept")
    frame["median"] = frame.pop("on_p50")
    frame.to_csv(tmp_path / "t.csv", index=False)
    named = {"module": "module", "ap": "score", "unit": "neuron", "on_p50": "median"}
    table = read_precision_table({"sw": tmp_path / "t.csv"}, config(), columns=named)
    assert table.languages == ("sw",)
    assert table.values("sw", "k")[0, 1] == 1.5


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"ap": [0.9, 0.1, 0.9, 0.5, 0.3, 1.5]}, DataError, "'ap' that is not from 0 to 1"),
        ({"ap": [0.9, 0.1, None, 0.5, 0.3, 0.5]}, DataError, "'ap' that is not from 0 to 1"),
        ({"ap": "high"}, DataError, "'ap' that is not from 0 to 1"),
        ({"unit": [0, 1, 2, 3, 4, 5.5]}, DataError, "no whole number"),
        ({"unit": "a"}, DataError, "no whole number"),
        ({"unit": [0, 0, 2, 3, 4, 5]}, DataError, "1 rows name a unit that"),
        ({"unit": [0, 1, 2, 3, 4, 128]}, DataError, "do not fit the 128 outputs"),
        ({"layer": "transformer.h.0.mlp.experts"}, DataError, "no linear layer of BloomForCausalLM"),
    ],
)
def test_tables_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, Any], error: Any, text: str):
    small(**change).to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(error, match=text) as caught:
        read_precision_table(tmp_path / "t.csv", config())
    sentence(caught.value)


def test_other_refusals(tmp_path: Path):
    path = tmp_path / "t.csv"
    small().to_csv(path, index=False)
    table = read_precision_table(path, config())
    (tmp_path / "empty.csv").write_bytes(b"")
    (tmp_path / "binary.csv").write_bytes(bytes(range(128, 256)) * 4)
    small().drop(columns="concept").to_csv(tmp_path / "nobody.csv", index=False)
    cases = [
        (SettingError, "which='all'", lambda: table.neurons(which="all")),
        (SettingError, "an even k", lambda: table.neurons(k=3)),
        (SettingError, "k=0", lambda: table.neurons(k=0, which="top")),
        (DataError, "'de' has 6 rows, but k=8", lambda: table.neurons(k=8)),
        (DataError, "no language 'fr'", lambda: table.values("fr", "k")),
        (DataError, "no site 'up'", lambda: table.values("de", "up")),
        (DataError, "no column 'on_p90'", lambda: table.values("de", "k", "on_p90")),
        (SettingError, "names no file", lambda: read_precision_table({}, config())),
        (StorageError, "does not exist", lambda: read_precision_table(tmp_path / "no.csv", config())),
        (StorageError, "cannot be read as CSV", lambda: read_precision_table(tmp_path / "empty.csv", config())),
        (StorageError, "cannot be read as CSV", lambda: read_precision_table(tmp_path / "binary.csv", config())),
        (DataError, "no column 'concept'", lambda: read_precision_table(tmp_path / "nobody.csv", config())),
    ]
    for kind, text, call in cases:
        with pytest.raises(kind, match=text) as caught:
            call()
        sentence(caught.value)
