"""Starting a Weights & Biases run, and finding out beforehand whether it can go online."""

from __future__ import annotations

import netrc
import os
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from reidreg.config.sections import Config, WandbConfig
from reidreg.logs.console import logger


def start_wandb(config: Config, folder: Path) -> Any:
    """Start a W&B run, or return None if W&B is disabled or fails to start.

    Login and network are checked first, which takes seconds and never prompts; if one is missing,
    a line says so and the run is recorded offline.
    """
    settings = config.wandb
    if settings.mode == "disabled":
        return None
    mode = settings.mode
    if mode == "online":
        obstacle = wandb_obstacle()
        if obstacle is not None:
            logger.warning("W&B: %s; this run is recorded offline", obstacle)
            mode = "offline"
    run = _init(settings, mode, config, folder)
    if run is not None:
        logger.info("W&B: %s run %s in project %s", mode, run.name or run.id, settings.project)
    return run


def _init(settings: WandbConfig, mode: str, config: Config, folder: Path) -> Any:
    import wandb

    try:
        return wandb.init(
            mode=mode,  # type: ignore[arg-type]
            project=settings.project,
            entity=settings.entity,
            name=settings.name,
            tags=list(settings.tags),
            config=config.as_dict(),
            dir=folder,
            # Without these W&B uploads code, diffs and the terminal's text.
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                disable_code=True,
                save_code=False,
                x_save_requirements=False,
                init_timeout=15,
            ),
        )
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        if mode == "online":
            logger.warning("W&B: %s; this run is recorded offline", reason)
            return _init(settings, "offline", config, folder)
        logger.warning("W&B: %s; this run is not recorded there", reason)
        return None


def wandb_obstacle(timeout: float = 5.0) -> str | None:
    """Why an online run could not start, in a few words, or None if it probably can.

    Args:
        timeout: Seconds to wait for the network.
    """
    url = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    host = url.hostname or "api.wandb.ai"
    if not os.environ.get("WANDB_API_KEY") and not _netrc_key(host):
        return "not logged in (run `wandb login`)"
    # Behind a proxy only the proxy can be reached.
    proxy = urlsplit(getproxies().get(url.scheme, "") if not proxy_bypass(host) else "")
    target = proxy if proxy.hostname else url
    port = target.port or (443 if target.scheme == "https" else 80)
    try:
        socket.create_connection((target.hostname, port), timeout=timeout).close()
    except OSError as error:
        return f"{target.hostname} cannot be reached ({error.strerror or error})"
    return None


def _netrc_key(host: str) -> bool:
    """Whether the netrc file holds a key; an entry with an empty password is not a login."""
    path = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    try:
        entry = netrc.netrc(str(path)).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return False
    return bool(entry and entry[2])
