"""Where corpus and caches lie, told by a run's folder, a folder of caches, one cache, or their URLs."""

from __future__ import annotations

from dataclasses import dataclass

from storage.errors import IncompleteCache
from storage.remote import RemotePath, Root
from storage.stores import CACHE, CORPUS, INFO


@dataclass(frozen=True)
class Places:
    """A corpus and its teachers' caches.

    Attributes:
        corpus: the corpus folder.
        caches: teacher → cache folder, by name.
    """

    corpus: Root
    caches: dict[str, Root]


def find(root: Root, corpus: Root | None = None) -> Places:
    """Returns what lies at a folder, which is one of

        RUN            RUN/corpus and RUN/cache/TEACHER
        RUN/cache      a folder of teachers' caches; the corpus is RUN/corpus unless given
        RUN/cache/ONE  one teacher's cache; the same

    Args:
        corpus: the corpus folder, where it lies elsewhere.

    Raises:
        IncompleteCache: no cache, or no corpus.
        RemoteError: the store cannot be reached.
    """
    if _holds(root, CACHE):
        caches, run = {root.name: root}, _parent(_parent(root))
    else:
        folder, run = (root / "cache", root) if _is_run(root) else (root, _parent(root))
        caches = {name: folder / name for name in _names(folder) if _holds(folder / name, CACHE)}
    if not caches:
        raise IncompleteCache(
            "there is no teacher's cache", where=root,
            expected="a run's folder, a folder of teachers' caches, or one cache",
            todo="name another folder, or run `scholiast cache-teachers`",
        )  # fmt: skip
    corpus = run / "corpus" if corpus is None else corpus
    if not _holds(corpus, CORPUS):
        raise IncompleteCache(
            "the corpus of these caches is not where it is looked for", where=corpus,
            expected="a folder with corpus.json",
            todo="give it: open_cache(…, corpus=FOLDER), or run `scholiast prepare`",
        )  # fmt: skip
    return Places(corpus, caches)


def _holds(root: Root, kind: str) -> bool:
    return (root / INFO[kind]).exists()


def _is_run(root: Root) -> bool:
    """A run's folder has caches in `cache`; a folder of caches may have a teacher of that name."""
    return bool(_names(root / "cache")) and not _holds(root / "cache", CACHE)


def _names(root: Root) -> list[str]:
    if isinstance(root, RemotePath):
        return sorted(root.names())
    return sorted(path.name for path in root.iterdir()) if root.is_dir() else []


def _parent(root: Root) -> Root:
    if isinstance(root, RemotePath):
        return RemotePath(root.url.rsplit("/", 1)[0], root.cache)
    return root.absolute().parent
