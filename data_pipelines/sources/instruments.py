"""Notes of instruments with exact captions, from an installed package: "acoustic grand piano playing C4".

The instruments are those of the General MIDI soundfont TimGM6mb that the package pretty-midi carries (GPL-2; it is
read where it lies), played by tinysoundfont.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from flagdit.data_pipelines.records import Raw, Rejected, Source, stable_hash
from flagdit.data_pipelines.sound import cut, wav
from flagdit.data_pipelines.sources.sounds import check_sound
from flagdit.data_pipelines.user_files import check_holdout, drawn_split
from flagdit.errors import DataError, RecipeError

PACKAGES = {"tinysoundfont": "tinysoundfont", "pretty-midi": "pretty_midi"}
SOUNDFONT = "TimGM6mb.sf2"
NOTES = ("C", "C sharp", "D", "E flat", "E", "F", "F sharp", "G", "A flat", "A", "B flat", "B")
PROGRAMS = 128
LOUD, HELD = 100, 0.75
LICENCE = "Rendered with the soundfont TimGM6mb (Tim Brechbill, GPL-2)."

NAMES = """
acoustic grand piano, bright acoustic piano, electric grand piano, honky-tonk piano, electric piano, chorused piano,
harpsichord, clavinet, celesta, glockenspiel, music box, vibraphone, marimba, xylophone, tubular bells, dulcimer,
drawbar organ, percussive organ, rock organ, church organ, reed organ, accordion, harmonica, tango accordion,
nylon string guitar, steel string guitar, jazz guitar, clean electric guitar, muted electric guitar, overdriven guitar,
distortion guitar, guitar harmonics, acoustic bass, fingered bass, picked bass, fretless bass, slap bass, second slap
bass, synth bass, second synth bass, violin, viola, cello, contrabass, tremolo strings, pizzicato strings, harp,
timpani, string ensemble, slow strings, synth strings, second synth strings, choir, voice, synth voice, orchestra hit,
trumpet, trombone, tuba, muted trumpet, French horn, brass section, synth brass, second synth brass, soprano saxophone,
alto saxophone, tenor saxophone, baritone saxophone, oboe, English horn, bassoon, clarinet, piccolo, flute, recorder,
pan flute, blown bottle, shakuhachi, whistle, ocarina
"""
"""The first 80 programs of General MIDI, those that play notes of a named instrument."""


def source(
    *,
    rate: int = 16000,
    seconds: float = 1.0,
    multiple: int = 1024,
    pitches: Sequence[str] = ("48", "52", "55", "60", "64", "67", "72"),
    limit: int = 0,
    holdout: float = 0.0,
    seed: int = 0,
) -> Source:
    """Single notes of the instruments of a soundfont, each at several pitches.

    Args:
        rate: samples per second.
        seconds: length of every sound; the note is held for three quarters of it.
        multiple: lengths are multiples of this many samples: audio.hop times model.patch_size.
        pitches: MIDI numbers; 60 is C4.
        limit: instruments; 0: all.
        holdout: share of (instrument, pitch) pairs in the split "heldout".
        seed: draws the held-out pairs.

    Raises:
        RecipeError: an option that cannot be met.
        DataError: the packages are not installed.
    """
    check_sound(rate, seconds, multiple)
    check_holdout(holdout)
    wrong = [p for p in pitches if not (p.isdecimal() and int(p) < PROGRAMS)]
    if wrong:
        raise RecipeError(f"--pitches {','.join(pitches)} must be MIDI numbers from 0 to 127")
    names = [" ".join(n.split()) for n in NAMES.split(",")][: limit or None]
    soundfont = _soundfont()

    def items() -> Iterator[Raw | Rejected]:
        play = partial(_play, _synth(soundfont, rate), rate=rate, seconds=seconds)
        for program, name in enumerate(names):
            for key in map(int, pitches):
                label = f"{NOTES[key % 12]}{key // 12 - 1}"
                place = f"{name.replace(' ', '_')}/{key:03d}"
                try:
                    samples = cut(play(program, key), rate, seconds, multiple)
                except DataError as error:
                    yield Rejected(place, error.what)
                    continue
                yield Raw(
                    key=place,
                    media={"wav": wav(samples, rate)},
                    shape=(1, 1, 1, len(samples)),
                    caption=f"{name} playing {label}",
                    split=drawn_split(seed, place, holdout),
                    label=program,
                    meta={"instrument": name, "pitch": key, "rate": rate},
                )

    settings = {
        "kind": "instruments", "rate": rate, "seconds": seconds, "multiple": multiple, "pitches": list(pitches),
        "limit": limit, "holdout": holdout, "seed": seed, "soundfont": f"{stable_hash(soundfont.stat().st_size):016x}",
        "packages": {p: version(p) for p in PACKAGES},
    }  # fmt: skip
    return Source("audio", len(names) * len(pitches), settings, LICENCE, items())


def _soundfont() -> Path:
    missing = [package for package, module in PACKAGES.items() if find_spec(module) is None or not _installed(package)]
    if missing:
        raise DataError(
            f"instruments need the packages {', '.join(PACKAGES)}; missing: {', '.join(missing)}",
            fix=f"`pip install --no-deps {' '.join(missing)}`.",
        )
    spec = find_spec(PACKAGES["pretty-midi"])
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / SOUNDFONT


def _installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def _synth(soundfont: Path, rate: int):
    import tinysoundfont

    synth = tinysoundfont.Synth(samplerate=rate)
    return synth, synth.sfload(str(soundfont))


def _play(synth, program: int, key: int, *, rate: int, seconds: float) -> np.ndarray:
    player, font = synth
    player.sounds_off()
    player.program_select(0, font, 0, program)
    held = int(rate * seconds * HELD)
    player.noteon(0, key, LOUD)
    parts = [bytes(player.generate(held))]
    player.noteoff(0, key)
    parts.append(bytes(player.generate(int(rate * seconds) - held)))
    stereo = np.frombuffer(b"".join(parts), np.float32).reshape(-1, 2)
    return stereo.mean(axis=1)
