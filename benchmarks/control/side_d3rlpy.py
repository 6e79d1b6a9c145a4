"""d3rlpy as a side of the offline rows: its replay in memory, its `update` on batches that it samples, no logging.

PYTHONPATH=build/peers/d3rlpy-2.8.1 build/peers/venv/bin/python -m benchmarks.control.side_d3rlpy td3bc --width 256
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from benchmarks.control.settings import OFFLINE
from benchmarks.control.side import Meter, parser, prepare, say

GIVEN = parser(__doc__, tuple(OFFLINE)).parse_args()
prepare(GIVEN.threads)

import d3rlpy  # noqa: E402
import numpy as np  # noqa: E402
import structlog  # noqa: E402
import torch  # noqa: E402

ARRAYS = Path(__file__).resolve().parents[2] / "build" / "bench" / "halfcheetah" / "transitions.npz"


def dataset() -> Any:
    found = np.load(ARRAYS)
    ends = found["terminated"] | found["truncated"]
    ends[-1] = True
    return d3rlpy.dataset.MDPDataset(found["observation"], found["action"].clip(-1, 1), found["reward"][:, None],
                                     found["terminated"], ends & ~found["terminated"])  # fmt: skip


def algorithm() -> Any:
    s, hidden = OFFLINE[GIVEN.row], [GIVEN.width] * 2
    encoder = d3rlpy.models.VectorEncoderFactory(hidden_units=hidden)
    shared = {"batch_size": s["batch_size"], "gamma": s["gamma"], "tau": s["tau"], "actor_learning_rate": s["learning_rate"],
              "critic_learning_rate": s["learning_rate"], "actor_encoder_factory": encoder,
              "critic_encoder_factory": encoder}  # fmt: skip
    if GIVEN.row == "td3bc":
        return d3rlpy.algos.TD3PlusBCConfig(alpha=s["alpha"], update_actor_interval=s["delay"],
                                            target_smoothing_sigma=s["smoothing"], target_smoothing_clip=s["clip"],
                                            observation_scaler=d3rlpy.preprocessing.StandardObservationScaler(),
                                            **shared).create("cpu")  # fmt: skip
    return d3rlpy.algos.IQLConfig(expectile=s["expectile"], weight_temp=s["beta"], max_weight=s["cap"],
                                  value_encoder_factory=encoder, **shared).create("cpu")  # fmt: skip


def main() -> None:
    torch.set_num_threads(GIVEN.threads)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    d3rlpy.seed(GIVEN.seed)
    if GIVEN.precision == "mkldnn":
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    data, algo = dataset(), algorithm()
    if algo.observation_scaler is not None:
        algo.observation_scaler.fit_with_transition_picker(data.episodes, data.transition_picker)
    algo.build_with_dataset(data)
    context = torch.autocast("cpu", dtype=torch.bfloat16) if GIVEN.precision == "autocast" else nullcontext()
    meter, going = Meter("update", GIVEN.warm, GIVEN.seconds), True
    with context:
        while going:
            algo.update(data.sample_transition_batch(algo.batch_size))
            going = meter.add(1)
    notes = f"d3rlpy, {GIVEN.threads} thread(s), {GIVEN.precision}"
    say(meter.result(notes, ("d3rlpy", "torch", "numpy")))


if __name__ == "__main__":
    main()
