"""An adapter fused into its base: one folder that mlx-lm, LM Studio and transformers load, and how true it is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlxft.errors import ExportError
from mlxft.export.fidelity import Gap, Meter, Outputs, ScoreMeter, TextMeter, kept_share, standing_in, unpacked
from mlxft.export.precision import (
    FLOAT,
    Form,
    Forms,
    Ladder,
    Trial,
    fused_paths,
    least,
    model_bytes,
    name_of,
    options_of,
    search,
    standins,
    uniform,
)
from mlxft.export.probe import Probe, find_probe
from mlxft.export.sources import Source, attach_sources, find_sources, load_base
from mlxft.model.fingerprint import without_weights
from mlxft.model.folder import check_destination, check_space, check_unused, save_folder, weight_bytes
from mlxft.model.heads import (
    HEAD_FILE,
    find_head,
    head_arrays,
    head_metadata,
    head_of,
    read_head,
    without_head,
)
from mlxft.model.load import Loaded, base_fingerprint
from mlxft.model.logits import Split
from mlxft.model.lora import QUANTIZED, dense_weight, plain
from mlxft.objectives.onpolicy.reward_model import reads_chat
from mlxft.trainer.files import save_arrays

KEEP = 0.95  # share of the adaptation that is to be kept


@dataclass
class Fused:
    """What fusing did, or would have done.

    Attributes:
        layers: how many were fused.
        bytes: of the weights written.
        whole: between the adapted model and its base; what there is to keep.
        trials: the models that were measured; `chosen` is one of them.
        measure: what their divergences are (see fidelity.py).
    """

    out: Path
    layers: int
    adapters: list[Source]
    probe: Probe
    measure: str
    whole: Gap
    trials: list[Trial]
    chosen: Trial
    keep: float
    notes: list[str] = field(default_factory=list)
    written: bool = False
    bytes: int = 0

    def lines(self) -> list[str]:
        """In words and a table."""
        of = f" of {len(self.adapters)} adapters" if len(self.adapters) > 1 else ""
        done = f"wrote {self.out} ({self.bytes / 1e6:,.1f} MB of weights)" if self.written else "nothing is written"
        scores = self.measure != "kl"
        unit = "squared difference" if scores else "KL a token"
        what = f"{len(self.probe.rows)} answers" if scores else f"{self.probe.tokens:,} tokens"
        same = "same order" if scores else "same likeliest token"
        lines = [
            f"fused {self.layers:,} layers{of}; {done}",
            *self.notes,
            (
                f"measured on {what} ({self.probe.source}); from the adapted model to its base:\n"
                f"{'mean ' if scores else ''}{unit}{' of scores' if scores else ''} {self.whole.divergence:.3g}, "
                f"{'pairs in the ' if scores else ''}{same} {self.whole.agreement:.1%}"
            ),
        ]
        rows = [("fused layers", "weights", unit, "kept", same)]
        for trial in sorted(self.trials, key=lambda t: t.bytes):
            kept = "-" if trial.kept is None else f"{trial.kept:.1%}"
            size = f"{trial.bytes / 1e6:,.1f} MB"
            rows.append((trial.name, size, f"{trial.divergence:.3g}", kept, f"{trial.agreement:.1%}"))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        marks = [" ", *("*" if t is self.chosen else " " for t in sorted(self.trials, key=lambda t: t.bytes))]
        for mark, row in zip(marks, rows):
            cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
            lines.append(f"{mark} {'  '.join(cells)}".rstrip())
        if self.chosen.kept is None:
            lines.append("the adapter changes nothing on these rows: there is nothing to keep")
        return lines

    def to_json(self) -> dict[str, Any]:
        """For programs; bits 0 are float."""
        raised = {path: form.bits for path, form in self.chosen.forms.items()}
        return {
            "path": str(self.out),
            "written": self.written,
            "layers": self.layers,
            "bytes": self.bytes,
            "adapters": [{"path": str(source.folder), "weight": source.weight} for source in self.adapters],
            "probe": {"source": self.probe.source, "rows": len(self.probe.rows), "tokens": self.probe.tokens},
            "measure": self.measure,
            "adapted_to_base": self.whole.divergence,
            "adapted_to_fused": self.chosen.divergence,
            "kept": self.chosen.kept,
            "keep": self.keep,
            "agreement": self.chosen.agreement,
            "agreement_base": self.whole.agreement,
            "precision": self.chosen.name,
            "bits": raised,
            "tried": [
                {
                    "precision": t.name,
                    "bytes": t.bytes,
                    "adapted_to_fused": t.divergence,
                    "kept": t.kept,
                    "agreement": t.agreement,
                }
                for t in self.trials
            ],
            "notes": self.notes,
        }


class LostTooMuch(ExportError):
    """The fused model would keep less of the adaptation than is wished; `fused` says what was measured."""

    def __init__(self, text: str, fused: Fused) -> None:
        super().__init__(text)
        self.fused = fused


def fuse_layers(
    model: nn.Module, *, dequantize: bool = False, bits: int | None = None, forms: Forms | None = None
) -> Forms:
    """Replace every low-rank layer by a plain one that does the same.

    Args:
        dequantize: leave no layer of the model quantised.
        bits: of fused layers whose base is quantised; default: as the base.
        forms: of each fused layer, in place of these.
    Returns:
        Path of each fused layer -> what it became.
    """
    forms = uniform(model, 0 if dequantize else bits) if forms is None else forms
    for path, module in fused_paths(model).items():
        layer = forms[path].layer(module.base, module.fused_weight())
        mx.eval(layer.parameters())  # one dense weight at a time
        model.update_modules(tree_unflatten([(path, layer)]))
    if dequantize:
        rest = [(path, plain(m, dense_weight(m))) for path, m in model.named_modules() if isinstance(m, QUANTIZED)]
        model.update_modules(tree_unflatten(rest))
    return forms


def fused_config(loaded: Loaded, forms: Forms, dequantize: bool) -> dict[str, Any]:
    """config.json of the fused model: true to how each layer is quantised, as mlx-lm reads it."""
    config = copy.deepcopy(loaded.config)
    if dequantize:
        config.pop("quantization", None)
        config.pop("quantization_config", None)
        return config
    quantization = config.get("quantization")
    if quantization:
        for path, form in forms.items():
            own = quantization.get(path)
            before = own if isinstance(own, dict) else {**quantization, "bits": 0} if own is False else quantization
            was = Form(before["bits"], before["group_size"], before.get("mode", "affine"))
            if form.same or form == was or (form.bits == was.bits == 0):
                continue
            quantization[path] = {"group_size": form.group_size, "bits": form.bits, "mode": form.mode}
            if not form.bits:
                quantization[path] = False
        config["quantization_config"] = quantization
    return config


def fuse(
    run: Path | None,
    out: Path,
    *,
    adapters: Sequence[tuple[Path, float]] = (),
    model: str | None = None,
    dequantize: bool = False,
    bits: int | None = None,
    keep: float = KEEP,
    probe: str | None = None,
    force: bool = False,
    overwrite: bool = False,
    tell: Callable[[str], object] = lambda text: None,
) -> Fused:
    """Fuse a run or adapters into their base, measure what is kept of the adaptation, and write the folder `out`.

    On a quantised base the fused layers get the least precision that keeps `keep`, layer by layer.

    Args:
        run: a run or an adapter folder; with `adapters` also their base, or None.
        adapters: more of them, each with the number its change is multiplied by; all changes add up.
        model: the base, where the adapter does not say or it has moved.
        dequantize, bits: decide the precision, in place of what keeps enough.
        probe: a file of rows to measure on, or "valid": the validation rows of the runs; default: built-in text.
        force: write even what keeps less than `keep`.
        tell: told what is being done.
    Raises:
        ModelError: no such run, or an adapter of another base.
        LostTooMuch: less than `keep` would be kept; nothing is written.
        ConfigError: `out` is there and may not be replaced.
        ExportError: it can not be written.
    """
    check_destination(out, overwrite)
    sources, base = find_sources(run, adapters)
    tell("loading the base")
    loaded, notes = load_base(sources, model or base)
    check_unused(out, [loaded.path, *(source.folder for source in sources)])
    if (dequantize or bits) and not any(isinstance(m, QUANTIZED) for m in loaded.model.modules()):
        raise ExportError("the base is not quantised: --dequantize and --bits have nothing to act on")
    check_space(out, 0 if dequantize else weight_bytes(loaded.model) // 2)
    configs = [source.config for source in sources if source.config is not None]
    rows = find_probe(configs, loaded.tokenizer, probe, head_of(loaded.model) is not None)
    meter = _meter(loaded, rows)
    tell("measuring the base")
    with unpacked(loaded.model):
        before = meter.outputs()
    attach_sources(loaded, sources)
    tell("measuring the adapted model")
    with unpacked(loaded.model):
        adapted = meter.outputs()
    whole = meter.gap(adapted, before)
    del before
    trials = _trials(loaded.model, meter, adapted, whole, keep, dequantize, bits, tell)
    chosen = least(trials, keep)
    fused = Fused(
        out, len(chosen.forms), sources, meter.probe, meter.name, whole, trials, chosen, keep, [*notes, *rows.notes]
    )
    if not chosen.meets(keep) and not force:
        raise LostTooMuch("\n".join([*fused.lines(), _too_little(fused, dequantize, bits)]), fused)
    tell("writing")
    check_space(out, chosen.bytes)
    fuse_layers(loaded.model, dequantize=dequantize, forms=chosen.forms)
    _write(out, loaded, sources[0], fused_config(loaded, chosen.forms, dequantize), overwrite)
    fused.written, fused.bytes = True, weight_bytes(loaded.model)
    return fused


def _meter(loaded: Loaded, probe: Probe) -> Meter:
    split = Split(loaded.model)
    if head_of(loaded.model) is not None:
        return ScoreMeter(split, probe)
    sizes = {**loaded.config, **(loaded.config.get("text_config") or {})}
    return TextMeter(split, probe, split.vocabulary or int(sizes.get("vocab_size") or 1 << 17))


def _trials(
    model: nn.Module,
    meter: Meter,
    adapted: Outputs,
    whole: Gap,
    keep: float,
    dequantize: bool,
    bits: int | None,
    tell: Callable[[str], object],
) -> list[Trial]:
    """Models with the fused layers in one form or another, measured."""

    def measure(forms: Forms) -> Trial:
        name = name_of(forms)
        tell(f"measuring {name}")
        layers = standins(model, forms)
        with unpacked(model), standing_in(model, layers):
            gap = meter.gap(adapted, meter.outputs())
        kept = kept_share(gap.divergence, whole.divergence)
        return Trial(name, model_bytes(model, forms, dequantize), *gap, kept, forms)

    quantized = any(isinstance(module.base, QUANTIZED) for module in fused_paths(model).values())
    if dequantize or bits or not quantized:
        return [measure(uniform(model, 0 if dequantize else bits))]
    tell("measuring each layer")
    options = options_of(model, meter)
    eights = {
        path: next((o.form for o in given if o.form.bits == 8), given[-1].form) for path, given in options.items()
    }
    others = [eights] if any(given[0].form.bits < 8 for given in options.values()) else []
    return search(Ladder(options), others, measure, keep)


def _too_little(fused: Fused, dequantize: bool, bits: int | None) -> str:
    """What to do where less is kept than is wished."""
    kept, float_too = fused.chosen.kept or 0.0, FLOAT in fused.chosen.forms.values()
    if float_too:
        way = "so small an update is lost in the type of the weights: train it longer or at a higher rate, or --force"
    else:
        forced = f"--bits {bits}" if bits else "--keep"
        way = f"leave {forced} out, --dequantize, or write it all the same with --force"
    wished = f"{kept:.1%} of the adaptation is kept, wished is {fused.keep:.1%} (--keep)"
    return f"{wished}, so {fused.out} is not written; {way}"


def _write(out: Path, loaded: Loaded, source: Source, config: dict[str, Any], overwrite: bool) -> None:
    """The folder, with a reward model's head beside the weights."""
    file = find_head(source.folder)
    noted = read_head(file).about if file else {}
    if file:  # of a head that does not say it yet, its run knows
        noted["template"] = "auto" if reads_chat(source.folder, noted) else "none"
    with without_head(loaded.model) as head:

        def save_head(folder: Path) -> None:
            if head is not None:
                metadata = head_metadata(without_weights(base_fingerprint(loaded)), noted)
                save_arrays(folder / HEAD_FILE, head_arrays(head), metadata)

        options: dict[str, Any] = {"overwrite": overwrite, "source": loaded.path, "beside": save_head}
        save_folder(out, loaded.model, loaded.tokenizer, config, **options)
