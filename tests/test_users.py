"""`pybroker.users`: password hashes, who is let in, and that logins cost what they should."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pybroker import users as users_module
from pybroker.errors import AuthenticationFailed, ConfigurationError
from pybroker.users import PasswordHash, Users, hash_password, parse_hash, verify_password

ANNA = hash_password("correct horse")
CHEAP = "$scrypt$ln=4,r=8,p=1$c2FsdHNhbHQ$"  # its key follows


class Derivations(list[PasswordHash]):
    """The scrypt computations that were made, in order."""


@pytest.fixture
def derivations(monkeypatch: pytest.MonkeyPatch) -> Derivations:
    made = Derivations()
    original = PasswordHash.derive

    def derive(self: PasswordHash, password: str) -> bytes:
        made.append(self)
        return original(self, password)

    monkeypatch.setattr(PasswordHash, "derive", derive)
    return made


def test_a_hash_verifies_its_password_and_no_other():
    assert ANNA.startswith("$scrypt$ln=14,r=8,p=1$")
    assert verify_password("correct horse", ANNA)
    assert not verify_password("correct hors", ANNA)
    assert not verify_password("", ANNA)
    assert hash_password("correct horse") != ANNA, "each hash has a salt of its own"
    assert "correct horse" not in ANNA


def test_known_answer_of_rfc_7914():
    # the third vector of section 12, in the encoded form
    key = "cCO9yzr9c0hGHAbNgf04/+uo+7oOO0+btZuHkjVcvei1yVzi/k00oAA8wJW4jQkyzcM6DAGh1yyRg6CVcR8Dqg"
    assert parse_hash("$scrypt$ln=14,r=8,p=1$U29kaXVtQ2hsb3JpZGU$" + key).cost == 2**14
    assert not verify_password("pleaseletmeout", "$scrypt$ln=14,r=8,p=1$U29kaXVtQ2hsb3JpZGU$" + key)


@settings(max_examples=30, deadline=None)
@given(st.text(min_size=1), st.text())
def test_any_password_verifies_and_another_does_not(password: str, other: str):
    encoded = CHEAP + _key(CHEAP, password)
    assert verify_password(password, encoded)
    assert verify_password(other, encoded) == (other == password)


def _key(prefix: str, password: str) -> str:
    blank = parse_hash(prefix + "A" * 43)
    return users_module._encode(blank.derive(password))


def test_an_empty_password_is_not_hashed():
    with pytest.raises(ConfigurationError, match="must not be empty"):
        hash_password("")


@pytest.mark.parametrize(
    "encoded",
    [
        "",
        "hunter2",
        ANNA[:-30],
        ANNA + "=",
        ANNA.replace("scrypt", "bcrypt"),
        ANNA.replace("ln=14", "ln=0"),
        ANNA.replace("ln=14", "ln=30"),
        ANNA.replace("r=8", "r=0"),
        ANNA.replace("r=8", "r=999"),
        ANNA.replace("p=1", "p=17"),
        "$scrypt$ln=14,r=8,p=1$AAAA$" + "A" * 43,
        "$scrypt$ln=14,r=8,p=1$A$" + "A" * 43,
    ],
    ids=range(12),  # the hash is another one in each process
)
def test_a_hash_that_does_not_parse_stops_the_start_and_is_not_repeated(encoded: str):
    with pytest.raises(ConfigurationError, match=r"users\.anna: .*password hash") as caught:
        Users({"anna": encoded})
    assert not encoded or encoded not in str(caught.value)


def test_an_empty_user_name_stops_the_start():
    with pytest.raises(ConfigurationError, match="user name must not be empty"):
        Users({"": ANNA})


@pytest.mark.parametrize("anonymous", [True, False])
def test_a_login_is_checked_also_where_anonymous_is_allowed(anonymous: bool):
    users = Users({"anna": ANNA})
    assert users.authenticate("anna", "correct horse", anonymous=anonymous) == "anna"
    for login, passcode in (
        ("anna", "wrong"),
        ("anna", ""),
        ("anna", None),
        ("Anna", "correct horse"),
        ("eve", "correct horse"),
        (None, "correct horse"),
        ("", "correct horse"),
    ):
        with pytest.raises(AuthenticationFailed) as caught:
            users.authenticate(login, passcode, anonymous=anonymous)
        assert str(caught.value) == "user name or password is wrong, or a login is needed"


@pytest.mark.parametrize(("login", "passcode"), [(None, None), ("", ""), ("", None), (None, "")])
def test_no_login_comes_in_only_where_anonymous_is_allowed(login: str | None, passcode: str | None):
    users = Users({"anna": ANNA})
    assert users.authenticate(login, passcode, anonymous=True) is None
    assert users.answers_at_once(login, passcode, anonymous=True)
    with pytest.raises(AuthenticationFailed):
        users.authenticate(login, passcode, anonymous=False)


def test_without_any_users_an_anonymous_broker_has_nothing_to_check_against(derivations: Derivations):
    assert Users({}).authenticate("guest", "guest", anonymous=True) is None
    assert derivations == []
    with pytest.raises(AuthenticationFailed):
        Users({}).authenticate("guest", "guest", anonymous=False)
    assert len(derivations) == 1


def test_an_unknown_user_costs_one_scrypt_of_a_known_users_cost(derivations: Derivations):
    users = Users({"anna": ANNA})
    with pytest.raises(AuthenticationFailed):
        users.authenticate("anna", "wrong", anonymous=False)
    with pytest.raises(AuthenticationFailed):
        users.authenticate("eve", "wrong", anonymous=False)
    known, unknown = derivations
    assert (unknown.cost, unknown.block_size, unknown.parallelism) == (known.cost, known.block_size, known.parallelism)


def test_an_unknown_user_always_costs_the_same_where_costs_are_mixed(derivations: Derivations):
    users = Users({"anna": ANNA, "ben": CHEAP + "A" * 43})
    for name in ("eve", "mallory"):
        derivations.clear()
        for _ in range(3):
            with pytest.raises(AuthenticationFailed):
                users.authenticate(name, "wrong", anonymous=False)
        assert len(derivations) == 3
        assert len({derivation.cost for derivation in derivations}) == 1


def test_a_thousand_reconnects_cost_one_scrypt(derivations: Derivations):
    users = Users({"anna": ANNA})
    assert not users.answers_at_once("anna", "correct horse", anonymous=False)
    for _ in range(1_000):
        assert users.authenticate("anna", "correct horse", anonymous=False) == "anna"
    assert len(derivations) == 1
    assert users.answers_at_once("anna", "correct horse", anonymous=False)
    assert not users.answers_at_once("anna", "wrong", anonymous=False)


def test_a_wrong_password_is_never_remembered_and_never_spoils_what_is(derivations: Derivations):
    users = Users({"anna": ANNA})
    users.authenticate("anna", "correct horse", anonymous=False)
    for _ in range(3):
        with pytest.raises(AuthenticationFailed):
            users.authenticate("anna", "wrong", anonymous=False)
    assert len(derivations) == 4
    assert users.authenticate("anna", "correct horse", anonymous=False) == "anna"
    assert len(derivations) == 4


def test_what_is_remembered_holds_no_password():
    users = Users({"anna": ANNA})
    users.authenticate("anna", "correct horse", anonymous=False)
    assert "correct horse" not in repr(vars(users))


def test_logins_from_several_threads():
    encoded = {f"user{n}": CHEAP + _key(CHEAP, f"password{n}") for n in range(8)}
    users = Users(encoded)
    wrong: list[str] = []

    def log_in(n: int) -> None:
        for turn in range(50):
            guess = f"password{(n + turn) % 8}"
            try:
                right = users.authenticate(f"user{n}", guess, anonymous=False) == f"user{n}"
            except AuthenticationFailed:
                right = False
            if right != (guess == f"password{n}"):
                wrong.append(f"user{n} {guess}")

    threads = [threading.Thread(target=log_in, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
