"""One header for every record that a test writes, and one reading of records; a test names only what it is about."""
from flashoptim_nb.base.config import content_hash
from flashoptim_nb.base.records import read_study


def header(run, config="baseline", seed=0, *, hypothesis="h1", scale="gpu", role="1B", settings=None, **fields):
    "Every field that a record's header needs; `fields` are added, or stand in for those here."
    settings = settings or dict(config=config, role=role)
    origin = dict(package_version="0", commit="c", device="GPU A", device_kind="cpu" if scale == "laptop" else "cuda",
                  driver="d", libraries={"torch": "2"})
    return dict(
        run=run, hypothesis=hypothesis, study=f"{hypothesis}-{scale}", scale=scale, role=role, size=role, arm="best",
        config=config, seed=seed, settings=settings, settings_hash=content_hash(settings), criteria_hash="criteria",
        data_hash="data", started=f"2026-01-01T00:00:{seed:02}", command="test") | origin | fields


def without(value, names):
    "A value of a record without the fields of these names, however deep."
    if isinstance(value, dict): return {k: without(v, names) for k, v in value.items() if k not in names}
    return [without(v, names) for v in value] if isinstance(value, list) else value


def rows_without(study, names):
    "The rows of a study, by run, without the fields of these names."
    return {run.id: [without(row, names) for row in run.rows] for run in read_study(study)}
