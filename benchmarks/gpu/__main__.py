"""`make bench-gpu`: measures this GPU; the last lines are for programs.

python -m benchmarks.gpu            on a GPU: correctness, then a decoder with the path ÷ without, then training
python -m benchmarks.gpu --smoke    the same code small, through Triton's interpreter where there is no GPU
python -m benchmarks.gpu --model    no GPU: the model's prediction for A100, H100 and B200
python -m benchmarks.gpu --code     no GPU: every kernel's machine code, held to its bounds
"""

import argparse
import os
import sys
import time

import torch

# Seconds for everything, including a margin for the last part.
BUDGET = 510


def on_a_card(*, small: bool) -> bool:
    """Check and measure; print the last lines; whether everything was right."""
    from benchmarks.gpu import correctness, serving, training

    begin = time.monotonic()

    def seconds_left() -> float:
        return BUDGET - (time.monotonic() - begin)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    load = serving.SMALL if small else serving.Load()
    counts = [correctness.check_all(device, seconds_left, small=small), serving.check_all(load, device, seconds_left)]
    print(f"{time.monotonic() - begin:.0f} s for the checks", flush=True)
    lines = []
    ratios = serving.measure_all(load, device, seconds_left)
    if not small:
        if seconds_left() > 60:
            training.measure()
        for line, step in (
            ("decode-64-1-adapter", "decode 64, 1 adapters"),
            ("decode-64-25-adapters", "decode 64, 25 adapters"),
            ("prefill", "prefill 1024, 1 adapters"),
        ):
            # Report the side stream separately: it is an option of the engine, off by default.
            default, other = (ratios.get(f"{step}, {way}") for way in ("one stream", "side stream"))
            if other is not None:
                print(f"{step}, side stream: {other:.3f}")
            lines.append(f"bench-gpu: {line}/backbone {'not measured' if default is None else f'{default:.3f}'}")
    right, cases = (sum(column) for column in zip(*counts, strict=True))
    print("\n".join([*lines, f"bench-gpu: correct {right} of {cases}"]))
    return right == cases


def main() -> None:
    """Run what the flags select."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    chosen = parser.add_mutually_exclusive_group()
    for flag in ("--smoke", "--model", "--code"):
        chosen.add_argument(flag, action="store_true")
    options = parser.parse_args()
    # Triton reads it when it is imported.
    if options.code or options.model or torch.cuda.is_available():
        os.environ.pop("TRITON_INTERPRET", None)
    else:
        os.environ["TRITON_INTERPRET"] = "1"
    if options.code:
        from benchmarks.gpu import generated_code

        sys.exit(not generated_code.report())
    if options.model:
        from benchmarks.gpu import step_model

        step_model.report()
        return
    if not options.smoke and not torch.cuda.is_available():
        sys.exit("bench-gpu: there is no GPU here, so nothing was measured (SMOKE=1 and MODEL=1 need none)")
    torch.manual_seed(0)
    sys.exit(not on_a_card(small=options.smoke))


if __name__ == "__main__":
    main()
