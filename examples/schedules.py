"""Draws the learning-rate schedules: python examples/schedules.py schedules.png."""

from __future__ import annotations

import sys

from entrenar.optim.schedulers import ConstantScheduler, CosineScheduler, StepScheduler, WSDScheduler

STEPS = 100
SCHEDULES = {
    "ConstantScheduler(1, warmup_steps=10)": ConstantScheduler(1, warmup_steps=10),
    "StepScheduler(1, gamma=0.5, step_size=25)": StepScheduler(1, gamma=0.5, step_size=25),
    "CosineScheduler(1, 0.1, 100, warmup_steps=10)": CosineScheduler(1, 0.1, STEPS, warmup_steps=10),
    "WSDScheduler(1, 0, 100, decay_steps=20, warmup_steps=10)": WSDScheduler(1, 0, STEPS, 20, warmup_steps=10),
}


def main(path: str) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3), layout="constrained")
    for name, schedule in SCHEDULES.items():
        axes.plot([schedule.get_lr(step) for step in range(STEPS + 1)], label=name)
    axes.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    axes.legend(fontsize=6)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


if __name__ == "__main__":
    main(sys.argv[1])
