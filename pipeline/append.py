"""More blocks for a finished corpus, without touching what is there."""

from __future__ import annotations

from pipeline.workspace import Workspace
from stages.corpus_identity import require_appendable
from storage.corpus_info import CorpusInfo
from storage.remote import require_local


def append_sources(work: Workspace) -> tuple[CorpusInfo, int]:
    """Prepares the sources that the configuration adds after those of the corpus.

    Returns:
        The corpus and how many blocks were added: 0 where the configuration adds nothing.

    Raises:
        IncompleteCache: there is no complete corpus.
        StaleCache: the configuration differs in more than sources added at the end.
        CorpusError, TeacherError, DiskFull: the corpus stays as it was.
    """
    work.ensure_assets()
    corpus, root = work.config.corpus, require_local(work.config.corpus_folder, "corpus_dir")
    identity, before = require_appendable(corpus, root, work.memo)
    if identity == before.identity:
        return before, 0
    from stages.corpus import append  # heavy, and not needed to say that nothing is new

    info = append(corpus, root, work.memo, work.progress)
    return info, info.blocks - before.blocks
