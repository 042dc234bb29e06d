"""``mcsd models``: what the catalog has, and what of it is on disk."""

from dataclasses import asdict

from mcsd.catalog import CATALOG, is_pulled, models_folder, path_of
from mcsd.cli.options import Json, command
from mcsd.cli.output import columns, print_json


@command
def models(json: Json = False) -> None:
    """List the models that can be named, and where they are."""
    if json:
        print_json({"folder": str(models_folder()), "models": [_as_object(name) for name in CATALOG]})
        return
    rows = [("NAME", "SIZE", "ON DISK", "DRAFT", "DESCRIPTION")]
    for name, entry in CATALOG.items():
        size = f"{entry.size / 1e6:.0f} MB"
        rows.append((name, size, "yes" if is_pulled(name) else "no", entry.draft or "ngram", entry.description))
    print("\n".join(columns(rows)))


def _as_object(name: str) -> dict[str, object]:
    entry = asdict(CATALOG[name])
    kept = {key: entry[key] for key in ("name", "size", "sha256", "draft", "description")}
    return kept | {"on_disk": is_pulled(name), "path": str(path_of(name))}
