"""The table of environment variables: each is read, refused or found misspelt."""

import pytest

from mpisync import settings


def test_the_environment_goes_before_code_and_code_before_the_default():
    read, name = settings.read, "MPISYNC_TRANSPORT"
    assert read(name, environ={}) == "auto"
    assert read(name, "shared", environ={}) == "shared"
    assert read(name, "shared", environ={name: "messages"}) == "messages"
    assert read(name, "shared", environ={name: ""}) == "shared", "empty is unset"


def test_nonsense_names_the_variable_the_value_and_the_rule():
    with pytest.raises(ValueError, match="MPISYNC_GRACE_S='-1'.*must be greater than 0"):
        settings.read("MPISYNC_GRACE_S", environ={"MPISYNC_GRACE_S": "-1"})
    with pytest.raises(ValueError, match="MPISYNC_READ_ONLY='maybe'.*must be 1 or 0"):
        settings.read("MPISYNC_READ_ONLY", environ={"MPISYNC_READ_ONLY": "maybe"})


def test_every_setting_is_in_order():
    for name, setting in settings.SETTINGS.items():
        assert name == setting.name and name.startswith(settings.PREFIX)
        assert setting.help and not setting.help.endswith(".")
        if setting.default is not None:
            assert settings.read(name, environ={name: str(setting.default)}) == setting.default


def test_a_misspelt_variable_is_found():
    environ = {"MPISYNC_TRANPORT": "shared", "MPISYNC_POLICY": "x", "HOME": "/"}
    assert settings.unknown(environ) == ["MPISYNC_TRANPORT"]
