"""`python -m tests.chaos`: trainings killed at random moments; each must end with the bits of an undisturbed one."""

import argparse
import tempfile
import time
from pathlib import Path

from services.diffusion.tiny import PRESETS, build_pipeline_folder
from tests.chaos.campaign import Campaign, Place, disturbed, undisturbed
from tests.chaos.nursery import Nursery, open_nursery
from tests.chaos.scenarios import SCENARIOS, STEPS

KILLS_PER_TRAINING = 5


def main() -> None:
    """Print a line for every kill; the exit status is 1 when a training ended otherwise than it should."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--kills", type=int, default=30, help="so many at least, default 30")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="default: the time")
    arguments = parser.parse_args()
    rounds = -(-arguments.kills // (KILLS_PER_TRAINING * len(SCENARIOS)))
    print(f"seed {arguments.seed}: {rounds} disturbed trainings of each kind, {STEPS} updates each")
    print(
        f"{'training':<16} {'seed':>12} {'killed in':<11} {'moment':>7} {'machine':<8} {'after update':>12}"
    )
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder, open_nursery() as nursery:
        differences = _all(nursery, Path(folder), range(arguments.seed, arguments.seed + rounds))
    print(
        f"{differences} differences" if differences else "all trainings ended with the bits they should have"
    )
    raise SystemExit(differences > 0)


def _all(nursery: Nursery, folder: Path, seeds: range) -> int:
    model = build_pipeline_folder(folder / "model", PRESETS["fixture"])
    differences = 0
    for scenario in SCENARIOS:
        place = Place(nursery, scenario, model, folder / scenario)
        reference = undisturbed(place)
        for seed in seeds:
            campaign = disturbed(place, reference, seed, KILLS_PER_TRAINING)
            _show(scenario, seed, campaign)
            differences += len(campaign.differences)
    return differences


def _show(scenario: str, seed: int, campaign: Campaign) -> None:
    for death in campaign.deaths:
        kill, machine = death.kill, "same" if death.stays else "another"
        print(
            f"{scenario:<16} {seed:>12} {kill.phase:<11} {kill.moment:>7} {machine:<8} {death.reached:>12}",
            flush=True,
        )
    for difference in campaign.differences:
        print(f"{scenario:<16} {seed:>12} DIFFERS: {difference}", flush=True)


if __name__ == "__main__":
    main()
