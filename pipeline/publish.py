"""`scholiast push`: the finished corpus and caches, copied to a remote store."""

from __future__ import annotations

from pipeline.workspace import Workspace
from storage.errors import ConfigError
from storage.push import push
from storage.remote import RemotePath, require_local, root_of
from storage.writer import owners


def publish(
    work: Workspace, url: str, verify: bool = False, dry_run: bool = False
) -> dict[str, int]:
    """Copies the corpus to URL/corpus and each teacher's cache to URL/cache/NAME.

    Args:
        verify: also read what stands there already, and send again what has other bytes.
        dry_run: send nothing.

    Returns:
        name → bytes sent (or that would be), 0 where all was there.

    Raises:
        IncompleteCache: something is not finished.
        ConfigError: no URL, or the run's own folders are remote.
        RemoteError, MissingShard, CorruptShard: of the store, or of a local file.
    """
    target = root_of(url, work.config.local_cache)
    if not isinstance(target, RemotePath):
        raise ConfigError(
            "a place to push to is a URL", where="URL", expected="s3://bucket/prefix", found=url,
            todo="give the URL of a store; a local folder can simply be copied",
        )  # fmt: skip
    info, jobs = work.finished_jobs()
    corpus = require_local(work.config.corpus_folder, "corpus_dir")
    sources = {"corpus": (corpus, info.owners, info.parts)}
    for job in jobs:
        of_job = owners(job.identity, job.layout), job.layout.parts
        sources[f"cache/{job.name}"] = (job.local_root, *of_job)
    sent = {}
    for name, (root, owner, parts) in sources.items():
        work.progress.start(f"{'compare' if dry_run else 'push'} {name}", 0, "byte")
        sent[name] = push(root, owner, parts, target / name, work.progress.advance, verify, dry_run)
        work.progress.finish()
    return sent
