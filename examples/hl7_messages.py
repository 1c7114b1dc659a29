"""Synthetic HL7 v2.5 messages: orders (ORM), results with an ECG in base64 (ORU), and referrals (REF).

Everything is invented and depends on ``(seed, number)`` only: the same two give the same bytes on every machine, so that
a checker can say what must arrive without having seen it sent. Each message has 0.5 to 200 KB. One in fifty names no
patient (PID-3 is empty): a careful receiver rejects it each time, until the broker puts it into the dead-letter queue.
"""

from __future__ import annotations

import base64
import hashlib
import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta

import hl7

ORDERS = "/queue/hl7.orders"
RESULTS = "/queue/hl7.results"
REFERRALS = "/queue/hl7.referrals"
QUEUES = (ORDERS, RESULTS, REFERRALS)
CONTENT_TYPE = "x-application/hl7-v2+er7"
REJECTED_EVERY = 50
BYTES_MIN, BYTES_MAX = 512, 200_000

_ESCAPES = str.maketrans({"\\": "\\E\\", "|": "\\F\\", "^": "\\S\\", "&": "\\T\\", "~": "\\R\\"})
_FIRST_DAY = datetime(2024, 1, 1, 8, 0)
_FAMILIES = ("Müller", "Øster", "García", "Nagy", "Ivanova", "王", "李", "Okafor", "Silva", "Haddad", "O'Neil", "Ng")
_GIVEN = ("Anna", "Björn", "Chloé", "Dávid", "Olga", "伟", "芳", "Chidi", "João", "Layla", "Sean", "Minh")
_CITIES = ("Northford", "Eastholm", "Southmere", "Westbury", "Lakeside", "Hillcrest")
_SERVICES = (
    ("93000", "ECG 12 leads"),
    ("71046", "Chest X-ray 2 views"),
    ("80053", "Metabolic panel"),
    ("85025", "CBC"),
)
_PHRASES = (
    "Chest pain on exertion for two weeks, relieved by rest.",
    "No known allergies & no regular medication.",
    "Blood pressure 150/95 | pulse 88 | saturation 97 %.",
    "Please advise on further work-up ~ tele-consultation preferred.",
    "History of type 2 diabetes, HbA1c 7.4 %.",
    "Family history: father ^ myocardial infarction at 52.",
    "The patient agreed to the transfer of the records \\ imaging follows.",
)


@dataclass(frozen=True, slots=True)
class Hl7Message:
    """One message: where it goes, its bytes, and what a checker needs."""

    number: int
    queue: str
    control_id: str  # MSH-10
    body: bytes
    sha256: str
    names_patient: bool  # False: to be rejected


def control_id_of(seed: int, number: int) -> str:
    return f"S{seed}N{number:06d}"


def number_of(control_id: str) -> int:
    """The number in a control id. Raises ValueError for one that was not made here."""
    return int(control_id.rpartition("N")[2])


def queue_of(number: int) -> str:
    return QUEUES[number % len(QUEUES)]


def names_patient(number: int) -> bool:
    return number % REJECTED_EVERY != REJECTED_EVERY - 1


def make_messages(seed: int, count: int) -> Iterator[Hl7Message]:
    """The messages 0 to ``count`` - 1 of a seed."""
    return (make_message(seed, number) for number in range(count))


def make_message(seed: int, number: int) -> Hl7Message:
    rng = random.Random(f"hl7/{seed}/{number}")
    queue, control_id = queue_of(number), control_id_of(seed, number)
    when = _FIRST_DAY + timedelta(seconds=37 * number)
    kind, fill = {ORDERS: ("ORM^O01", _order), RESULTS: ("ORU^R01", _result), REFERRALS: ("REF^I12", _referral)}[queue]
    message = _header(rng, kind, control_id, when)
    _patient(message, rng, number)
    fill(message, rng, when)
    body = str(message).encode("utf-8")
    if len(body) < BYTES_MIN:
        _add(message, "NTE", "99", "P", _text(rng, BYTES_MIN, BYTES_MIN + 200))
        body = str(message).encode("utf-8")
    return Hl7Message(number, queue, control_id, body, hashlib.sha256(body).hexdigest(), names_patient(number))


def _add(message: hl7.Message, name: str, *fields: str | tuple[str, ...]) -> None:
    """Append a segment. A tuple is a field of components; every text is escaped."""
    built = [message.create_field([name])]
    for field in fields:
        parts = (field,) if isinstance(field, str) else field
        components = [message.create_component([_escaped(part)]) for part in parts]
        built.append(message.create_field([message.create_repetition(components)]))
    message.append(message.create_segment(built))


def _escaped(text: str) -> str:
    # `Message.escape` of the library also turns what is not ASCII into hexadecimal; these messages are UTF-8 (MSH-18)
    return text.translate(_ESCAPES)


def _header(rng: random.Random, kind: str, control_id: str, when: datetime) -> hl7.Message:
    city = rng.choice(_CITIES)
    fields = [
        "MSH",
        "^~\\&",
        "CITY",
        city,
        "TELEMED",
        "PROVINCE",
        f"{when:%Y%m%d%H%M%S}",
        "",
        kind,
        control_id,
        "T",
        "2.5",
    ]
    parsed = hl7.parse("|".join([*fields, "", "", "", "", "", "UNICODE UTF-8"]) + "\r")
    assert isinstance(parsed, hl7.Message)
    return parsed


def _patient(message: hl7.Message, rng: random.Random, number: int) -> None:
    identifier = (f"{rng.randrange(10**8):08d}", "", "", "CITY", "MR") if names_patient(number) else ""
    born = datetime(1930, 1, 1) + timedelta(days=rng.randrange(33_000))
    name = (rng.choice(_FAMILIES), rng.choice(_GIVEN))
    street = (f"{rng.randrange(1, 200)} Main Street", "", rng.choice(_CITIES), "", f"{rng.randrange(10**5):05d}")
    _add(message, "PID", "1", "", identifier, "", name, "", f"{born:%Y%m%d}", rng.choice("FM"), "", "", street)
    doctor = (f"{rng.randrange(10**5):05d}", rng.choice(_FAMILIES), rng.choice(_GIVEN))
    _add(message, "PV1", "1", "O", ("CARD", "1", rng.choice(_CITIES)), "", "", "", doctor)


def _order(message: hl7.Message, rng: random.Random, when: datetime) -> None:
    for index in range(1, rng.randrange(2, 9)):
        placer = f"{rng.randrange(10**9):09d}"
        _add(message, "ORC", "NW", placer, "", "", "SC", "", "", "", f"{when:%Y%m%d%H%M}")
        _add(message, "OBR", str(index), placer, "", rng.choice(_SERVICES), "", f"{when:%Y%m%d%H%M}")
        _add(message, "NTE", str(index), "P", _text(rng, 60, 260))


def _result(message: hl7.Message, rng: random.Random, when: datetime) -> None:
    _add(message, "OBR", "1", f"{rng.randrange(10**9):09d}", "", _SERVICES[0], "", f"{when:%Y%m%d%H%M}")
    rate = rng.randrange(48, 130)
    _add(message, "OBX", "1", "NM", ("8867-4", "Heart rate", "LN"), "", str(rate), "/min", "60-100", "", "", "", "F")
    # from 1 KB to 140 KB of samples, small ones more often: at most 190 KB in base64
    samples = int(500 * 140 ** rng.random())
    ecg = base64.b64encode(_electrocardiogram(rng, rate, samples)).decode("ascii")
    data = ("TELEMED", "AP", "X-ECG-INT16LE", "Base64", ecg)
    _add(message, "OBX", "2", "ED", ("11524-6", "EKG study", "LN"), "", data, "", "", "", "", "", "F")
    _add(message, "NTE", "1", "L", _text(rng, 60, 400))


def _referral(message: hl7.Message, rng: random.Random, when: datetime) -> None:
    _add(message, "RF1", ("P", "Pending"), ("R", "Routine"), ("MED", "Medical"), "", "", f"{rng.randrange(10**7):07d}")
    _add(message, "PRD", ("RP", "Referring provider"), (rng.choice(_FAMILIES), rng.choice(_GIVEN)))
    _add(message, "DG1", "1", "I10", ("I20.9", "Angina pectoris, unspecified"), "", f"{when:%Y%m%d}", "W")
    for index in range(1, rng.randrange(2, 40)):
        _add(message, "NTE", str(index), "P", _text(rng, 80, 240))


def _text(rng: random.Random, low: int, high: int) -> str:
    words, wanted = "", rng.randrange(low, high)
    while len(words) < wanted:
        words += rng.choice(_PHRASES) + " "
    return words.rstrip()


def _electrocardiogram(rng: random.Random, rate: int, samples: int) -> bytes:
    """Sixteen-bit samples at 500 Hz: beats of one shape, of four heights. Whole numbers only, so equal everywhere."""
    length = 30_000 // rate
    waves = ((length * 2 // 10, 20, 90), (length * 4 // 10, 8, 1_000), (length * 65 // 100, 40, 220))  # P, QRS, T
    beats = []
    for height in (9, 10, 11, 12):
        beat = [0] * length
        for centre, half, top in waves:
            for offset in range(-half, half):
                beat[(centre + offset) % length] += top * height * (half - abs(offset)) // (half * 10)
        beats.append(struct.pack(f"<{length}h", *beat))
    signal = b"".join(rng.choice(beats) for _ in range(samples // length + 1))
    return signal[: 2 * samples]
