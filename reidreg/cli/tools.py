"""The commands `synthesize`, `doctor` and `import-config`."""

from __future__ import annotations

import argparse

from reidreg.cli.arguments import Parser


def synthesize_command(arguments: list[str]) -> int:
    """`reidreg synthesize`."""
    parser = Parser(
        prog="reidreg synthesize",
        description="Draw a data set of pedestrians in the layout of a real one.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="the folder to write the splits to"
    )
    parser.add_argument("--layout", choices=("aihub_kaist", "market1501"), default="aihub_kaist")
    parser.add_argument("--identities", type=int, default=80, metavar="N")
    parser.add_argument("--cameras", type=int, default=6, metavar="N")
    parser.add_argument("--images_per_camera", type=int, default=4, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument(
        "--full_size",
        action="store_true",
        help="as many identities, cameras and images as AIHub KAIST itself: 73,540 images",
    )
    own = parser.parse(arguments)
    from reidreg.logs.progress import ProgressBar
    from reidreg.synthesis.dataset import synthesize

    with ProgressBar("drawing") as bar:
        folders = synthesize(
            own.output,
            layout=own.layout,
            identities=own.identities,
            cameras=own.cameras,
            images_per_camera=own.images_per_camera,
            seed=own.seed,
            full_size=own.full_size,
            progress=bar.report,
        )
    for folder, (identities, images, cameras) in folders.items():
        print(f"{folder:<22} {identities:>6,} identities {images:>8,} images {cameras:>3} cameras")
    print(f"drawn: {own.output}")
    return 0


def doctor_command(arguments: list[str]) -> int:
    """`reidreg doctor`."""
    parser = Parser(
        prog="reidreg doctor", description="Check everything that a run needs, before the run."
    )
    parser.add_argument(
        "--config", action="append", default=[], help="check the data of this configuration too"
    )
    own = parser.parse(arguments)
    from reidreg.tools.doctor import examine

    lines, healthy = examine(own.config)
    print("\n".join(lines))
    return 0 if healthy else 2


def import_config_command(arguments: list[str]) -> int:
    """`reidreg import-config`."""
    parser = Parser(
        prog="reidreg import-config",
        description="Translate a reid-strong-baseline (yacs) configuration to YAML on stdout.",
    )
    parser.add_argument("file", metavar="OLD.yml")
    own = parser.parse(arguments)
    from reidreg.tools.import_yacs import import_config, render

    imported = import_config(own.file)
    print(render(imported, own.file), end="")
    return 0
