"""WebDataset corpora: tars whose members share a key, `000000123.jpg`, `.txt`, `.json`, as img2dataset writes them.

A tar is first indexed, then read sample by sample in the order in which their keys first appear, so members may lie
in any order. Members are read in memory and never unpacked. A stretch that is no tar is skipped, up to the next
header that is whole, and reported in `damage`.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from fourmill.pipeline.corpus import IMAGE_SUFFIXES, Corpus, Sample, is_hidden, open_binary, suffix_of
from fourmill.pipeline.corpus.values import MAX_TEXT_BYTES, as_metadata, as_text, caption_in, found, printable
from fourmill.pipeline.images import MAX_BYTES
from fourmill.pipeline.store import ObjectInfo

_BLOCK = 512
_TEXTS = ("txt", "text", "caption")
_BROKEN = (tarfile.TarError, ValueError, OverflowError, EOFError)
Members = dict[str, tarfile.TarInfo]  # by extension, in lower case


class WebDatasetCorpus(Corpus):
    """Keys are WebDataset's: the member's path up to the first dot of its last part."""

    format = "webdataset"

    def _read(self) -> Iterator[Sample]:
        tars = [o for o in self.objects if suffix_of(o.name) == "tar"]
        if not tars:
            raise ValueError(f"no tars in {self.src!r}: a webdataset corpus is one or more .tar files")
        self.ignored.update(f".{suffix_of(o.name)} beside the tars" for o in self.objects if suffix_of(o.name) != "tar")
        for info in tars:
            with open_binary(self.store, info) as file:
                yield from self._read_tar(file, info)

    def _read_tar(self, file: BinaryIO, info: ObjectInfo) -> Iterator[Sample]:
        try:
            # ignore_zeros: go on behind an end mark (tars that were concatenated) and behind damaged headers.
            tar = tarfile.TarFile(fileobj=file, ignore_zeros=True, encoding="utf-8", errors="surrogateescape")
        except _BROKEN as error:
            self.damage.append(f"{info.name}: not a tar: {error}")
            return
        for key, members in self._grouped(_members(tar, file, info, self.damage)):
            yield self._sample(tar, info.name, key, members)

    def _grouped(self, members: Sequence[tarfile.TarInfo]) -> list[tuple[str, Members]]:
        """Members by key, in order of appearance. The n-th member of one name belongs to its key's n-th sample."""
        named_members = [(m.name.removeprefix("./"), m) for m in members if self._is_data(m)]
        # Names with dots (`IMG.2024.jpg`) fit no WebDataset key; if a tar has only such, the last dot divides.
        split = _at_first_dot
        if not any(self._is_image(split(name)[1]) for name, _ in named_members):
            split = _at_last_dot
        samples: dict[str, list[Members]] = {}
        order: list[tuple[str, Members]] = []
        for name, member in named_members:
            key, extension = split(name)
            group = next((s for s in samples.setdefault(key, []) if extension not in s), None)
            if group is None:
                group = {}
                samples[key].append(group)
                order.append((key, group))
            group[extension] = member
        return order

    def _is_data(self, member: tarfile.TarInfo) -> bool:
        """Links and devices are never followed, hidden files are none of the corpus."""
        if member.isdir():
            return False
        kind = "" if member.isfile() else "tar member that is a link or device"
        kind = kind or ("hidden file" if is_hidden(member.name.removeprefix("./")) else "")
        self.ignored.update([kind] if kind else [])
        return not kind

    def _is_image(self, extension: str) -> bool:
        return extension == self.image_field if self.image_field else extension in IMAGE_SUFFIXES

    def _sample(self, tar: tarfile.TarFile, tar_name: str, key: str, members: Members) -> Sample:
        """The sample of one group: its image, its text (a member or a JSON field), its JSON object."""
        picked = self.image_field or next((e for e in IMAGE_SUFFIXES if e in members), "")
        texts = (self.text_field,) if self.text_field else _TEXTS
        text_member = next((e for e in texts if e in members), "")
        image = b""
        problem: str | None = f"no image: the members of this key are {printable(', '.join(members))}"
        if picked in members:
            image, problem = _read_member(tar, members[picked], MAX_BYTES)
        metadata, metadata_problem = _read_json(tar, members["json"]) if "json" in members else ({}, None)
        if text_member:
            text, text_problem = _read_text(tar, members[text_member])
        else:
            text, text_problem = caption_in(metadata, self.text_field)
        self.ignored.update(f".{printable(e)} in a tar" for e in members if e not in (picked, text_member, "json"))
        origin = printable(f"{tar_name}:{(members.get(picked) or next(iter(members.values()))).name}")
        problems = found(rgb=problem, alt_text=text_problem, source=metadata_problem)
        return Sample(key, image, text, metadata, origin, problems=problems)


def _members(tar: tarfile.TarFile, file: BinaryIO, info: ObjectInfo, damage: list[str]) -> list[tarfile.TarInfo]:
    """All members whose headers are whole; what lies between them and is not zero goes into `damage`."""
    members: list[tarfile.TarInfo] = []
    end = 0
    while True:
        try:
            member = tar.next()
        except _BROKEN as error:
            damage.append(f"{info.name}: {error} at byte {min(tar.offset, info.num_bytes)} of {info.num_bytes}")
            tar.offset += _BLOCK
            end = tar.offset
            if tar.offset >= info.num_bytes:
                return members
            continue
        if member is None:
            break
        _check_gap(file, info, end, member.offset, damage)
        members.append(member)
        end = tar.offset
    if end == info.num_bytes:
        damage.append(f"{info.name}: ends at byte {end} without an end mark; probably cut off there")
    _check_gap(file, info, end, info.num_bytes, damage)
    return members


def _check_gap(file: BinaryIO, info: ObjectInfo, start: int, stop: int, damage: list[str]) -> None:
    file.seek(start)
    left = stop - start
    while left > 0 and (chunk := file.read(min(left, 1 << 20))):
        if chunk.strip(b"\0"):
            damage.append(f"{info.name}: bytes {start} to {stop} are no whole member; what they held is lost")
            return
        left -= len(chunk)


def _at_first_dot(name: str) -> tuple[str, str]:
    folder, slash, leaf = name.rpartition("/")
    stem, _, extension = leaf.partition(".")
    return folder + slash + stem, extension.lower()


def _at_last_dot(name: str) -> tuple[str, str]:
    folder, slash, leaf = name.rpartition("/")
    stem, _, extension = leaf.rpartition(".") if "." in leaf else (leaf, "", "")
    return folder + slash + stem, extension.lower()


def _read_text(tar: tarfile.TarFile, member: tarfile.TarInfo) -> tuple[str | None, str | None]:
    data, problem = _read_member(tar, member, 8 * MAX_TEXT_BYTES)
    return (None, f"text {problem}") if problem else as_text(data)


def _read_json(tar: tarfile.TarFile, member: tarfile.TarInfo) -> tuple[dict[str, Any], str | None]:
    data, problem = _read_member(tar, member, 8 * MAX_TEXT_BYTES)
    return ({}, f"metadata {problem}") if problem else as_metadata(data)


def _read_member(tar: tarfile.TarFile, member: tarfile.TarInfo, limit: int) -> tuple[bytes, str | None]:
    """A member's bytes, or none and the reason. The size in the header is a stranger's claim: it is checked first."""
    if member.size > limit:
        return b"", f"too large: {member.size} bytes, at most {limit} are read"
    try:
        file: Any = tar.extractfile(member)
        return file.read(), None
    except (*_BROKEN, OSError) as error:
        return b"", f"truncated or corrupt: {error} in the tar at byte {member.offset_data}"
