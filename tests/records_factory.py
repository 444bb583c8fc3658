"""One header for every record that a test writes; a test names only what it is about."""
from flashoptim_nb.base.config import content_hash


def header(run, config="baseline", seed=0, *, hypothesis="h1", scale="gpu", role="1B", settings=None, **fields):
    "Every field that a record's header needs; `fields` are added, or stand in for those here."
    settings = settings or dict(config=config, role=role)
    origin = dict(package_version="0", commit="c", device="GPU A", device_kind="cpu" if scale == "laptop" else "cuda", driver="d", libraries={"torch": "2"})
    return dict(run=run, hypothesis=hypothesis, study=f"{hypothesis}-{scale}", scale=scale, role=role, size=role, arm="best", config=config, seed=seed, settings=settings,
                settings_hash=content_hash(settings), criteria_hash="criteria", data_hash="data", started=f"2026-01-01T00:00:{seed:02}", command="test") | origin | fields
