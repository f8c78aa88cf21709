"""Scenes as sounds: two seconds in which each thing is one note, with the seconds between which it sounds.

A scene is read like a page, row by row: its sixteen cells are sixteen beats of a tenth of a second, four bars of four
beats, between two short rests. The name of a thing is its **pitch** (whole tones from 330 Hz), its colour is the
**timbre** (breath in a band of its own above all pitches, as the body of an instrument resonates whatever is played on
it), its cell is its **beat**. No two things share a cell, so no two notes sound at once. Left and right are earlier and
later in a bar, above and below are earlier and later bars: every question about a picture has the same answer for a
sound. Held-out sounds are out of tune by amounts, and set in with a slowness, that training never has.
"""

import numpy as np

from studies.demo.world import CELLS, COLOURS, NAMES, Scene, Thing

RATE = 16_000  # samples a second
BEAT, REST = RATE // 10, RATE // 5  # samples of a beat, and of the rests before the first and after the last
SAMPLES = len(CELLS) * BEAT + 2 * REST
PITCHES = {name: 330.0 * 2 ** (i / 6) for i, name in enumerate(NAMES)}  # Hz
BANDS = {colour: 2400.0 * 3 ** (i / (len(COLOURS) - 1)) for i, colour in enumerate(COLOURS)}  # middles, Hz
BREADTH = 0.03  # of a band, as a share of its middle
CENTS = {False: (0.0, 25.0), True: (25.0, 40.0)}  # how far out of tune, in hundredths of a semitone, by held_out
ATTACK = {False: (0.003, 0.012), True: (0.012, 0.018)}  # seconds until a note has its full strength, by held_out
Span = tuple[float, float]  # seconds


def play(scene: Scene, held_out: bool = False) -> tuple[np.ndarray, dict[Thing, Span]]:
    """The sound of a scene (float32, mono, 2 s at 16 kHz, within -1 and 1) and when each thing sounds; always the same."""
    rng = np.random.default_rng(scene.seed)
    sound = _room(rng)
    spans: dict[Thing, Span] = {}
    for thing in scene.things:
        note = _note(thing, rng, held_out)
        first = REST + BEAT * thing.cell + int(rng.integers(0, BEAT - len(note) + 1))
        sound[first : first + len(note)] += note
        spans[thing] = (first / RATE, (first + len(note)) / RATE)
    return np.clip(sound, -1, 1).astype(np.float32), spans


def _room(rng: np.random.Generator) -> np.ndarray:
    """What sounds besides the things: hiss, a low hum, and clicks."""
    sound = rng.uniform(0.002, 0.012) * rng.standard_normal(SAMPLES)
    sound += rng.uniform(0, 0.03) * np.sin(2 * np.pi * (50 * np.arange(SAMPLES) / RATE + rng.random()))
    for _ in range(int(rng.integers(2, 7))):
        length, start = int(rng.integers(16, 64)), int(rng.integers(0, SAMPLES - 64))
        sound[start : start + length] += rng.uniform(0.02, 0.2) * rng.standard_normal(length)
    return sound


def _note(thing: Thing, rng: np.random.Generator, held_out: bool) -> np.ndarray:
    """One note: a tone, which is the strongest part of it, some of its octave, and breath."""
    length = int(rng.uniform(0.75, 0.95) * BEAT)
    seconds = np.arange(length) / RATE
    cents = rng.uniform(*CENTS[held_out]) * rng.choice((-1, 1))
    turns = PITCHES[thing.name] * 2 ** (cents / 1200) * seconds
    note = np.sin(2 * np.pi * (turns + rng.random())) + rng.uniform(0, 0.3) * np.sin(2 * np.pi * (2 * turns + rng.random()))
    note += rng.uniform(0.4, 0.7) * _breath(BANDS[thing.colour] * rng.uniform(0.985, 1.015), length, rng)
    rise, fall = rng.uniform(*ATTACK[held_out]), rng.uniform(0.008, 0.015)
    envelope = (
        np.minimum(1, seconds / rise) * np.minimum(1, (seconds[-1] - seconds) / fall) * np.exp(-rng.uniform(0, 8) * seconds)
    )
    return rng.uniform(0.1, 0.3) * envelope * note


def _breath(middle: float, length: int, rng: np.random.Generator) -> np.ndarray:
    """Noise of one band, root mean square 1."""
    away = np.fft.rfftfreq(2 * BEAT, 1 / RATE) / middle - 1
    band = np.fft.irfft(np.fft.rfft(rng.standard_normal(2 * BEAT)) * np.exp(-0.5 * (away / BREADTH) ** 2))[:length]
    return band / np.sqrt((band**2).mean())
