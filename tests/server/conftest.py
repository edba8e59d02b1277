import pytest

pytest.importorskip("zmq")
pytest.importorskip("uvicorn")
