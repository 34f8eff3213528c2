"""Peak memory of making directions: 4 layers, 131,072 atoms each, 4,000 pairs, above the model and its SAEs.

    .venv/bin/python tests/bench/direction_memory.py            about 2 minutes on one thread
    .venv/bin/python tests/bench/direction_memory.py --quick    400 pairs

Counted as the model's side, and there before the measurement starts: the weights of the model and of the 4 SAEs
(encoder and decoder, float32; the width D is small here so that they fit, and what the pass holds hardly depends on
it), and what one plain forward of the model leaves behind in the allocator. Counted against the 200 MB: the sequences,
the activations of the truncated forwards, chunks of atoms, all sums, and the directions of CAA, STA (both modes) and
all atoms with their files. The peak of the resident set is the kernel's own (VmHWM, reset at the start) where it can be
had, and sampled every 2 ms besides. Two ways of holding samples x atoms are given for comparison.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import subprocess
import tempfile
import threading
import time
import warnings
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from direction_speed import pairs, random_sae
from expert_stats import collect_contrast
from moe_steer.directions import DirectionWarning, all_atoms, caa, sta

WIDTH, ATOMS, LAYERS, VOCAB, LIMIT_MB = 32, 131_072, (1, 2, 3, 4), 512, 200


class Peak:
    """Highest resident set between ``start`` and ``stop``, in MB."""

    def __init__(self) -> None:
        self.sampled = 0.0
        self._running = True
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def start(self) -> float:
        """Reset the kernel's mark; what is resident now."""
        gc.collect()
        self.kernel_mark = _reset_mark()
        before = resident("VmRSS")
        self._thread.start()
        return before

    def stop(self) -> float:
        """The highest, by the kernel where it keeps a mark that was reset, else as sampled."""
        self._running = False
        self._thread.join()
        return max(self.sampled, resident("VmHWM") if self.kernel_mark else 0.0)

    def _sample(self) -> None:
        page = os.sysconf("SC_PAGE_SIZE") / 1e6
        while self._running:
            self.sampled = max(self.sampled, int(Path("/proc/self/statm").read_text().split()[1]) * page)
            time.sleep(0.002)


def resident(key: str) -> float:
    """VmRSS or VmHWM of this process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(key)), 0.0)


def _reset_mark() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return resident("VmHWM") < resident("VmRSS") + 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="400 pairs")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.set_grad_enabled(False)
    number = 400 if options.quick else 4000
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(
        f"commit {commit}, torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread"
    )
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = Qwen2ForCausalLM(config).eval().requires_grad_(False)
    saes = {layer: random_sae(WIDTH, ATOMS, layer, layer) for layer in LAYERS}
    sae_mb = sum(tensor.numel() * 4 for sae in saes.values() for tensor in sae.tensors().values()) / 1e6
    model(torch.zeros(64, 32, dtype=torch.long), use_cache=False)
    peak = Peak()
    before = peak.start()
    start = time.process_time()
    sequences = pairs(number, (4, 12), (2, 6), VOCAB)
    tokens = sum(len(item.positive) + len(item.negative) for item in sequences)
    contrasts = collect_contrast(model, sequences, LAYERS, saes=saes)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", DirectionWarning)
        for layer, sae in saes.items():
            contrast = contrasts[layer]
            made = (
                caa(contrast),
                sta(contrast, sae, keep=0.01),
                sta(contrast, sae, parity=True),
                all_atoms(contrast, sae),
            )
            for place, direction in enumerate(made):
                direction.save(Path(folder, f"{layer}-{place}.safetensors"))
    seconds = time.process_time() - start
    above = peak.stop() - before
    stacked = 2 * number * ATOMS * 4 * len(LAYERS) / 1e6
    print(
        f"{number} pairs, {tokens} answer tokens, {len(LAYERS)} layers, {ATOMS} atoms, width {WIDTH}; model and {len(saes)} SAEs ({sae_mb:.0f} MB of weights): {before:.0f} MB resident"
    )
    print(f"{'':<44}{'MB above':>10}")
    print(
        f"{'this pass, measured':<44}{above:>10.0f}   {'within' if above <= LIMIT_MB else 'OVER'} {LIMIT_MB} MB, {seconds:.0f} s of CPU"
    )
    print(f"{'sums alone, computed':<44}{2 * len(LAYERS) * 4 * 8 * ATOMS / 1e6:>10.0f}")
    print(f"{'2 x N x F in float32, all layers, computed':<44}{stacked:>10.0f}   (and as much again while stacking)")
    print(f"{'2 x N x F in float32, one layer, computed':<44}{stacked / len(LAYERS):>10.0f}")
    print(f"peak by {'the kernel' if peak.kernel_mark else 'sampling alone: the kernel mark cannot be reset here'}")


if __name__ == "__main__":
    main()
