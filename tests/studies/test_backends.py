"""The study of what the backends cost, at toy size: what it says, not how fast it is."""

from tests.studies import command


def test_every_backend_and_quantity_is_measured(tmp_path):
    sizes = "--layers 2 --width 32 --heads 2 --kv-heads 2 --ffn 64 --vocabulary 600 --image-side 3 --question 4 --rounds 6"
    asked = ["study", "backends", *sizes.split(), "--out", str(tmp_path / "r"), "--device", "cpu", "--json", "--quiet"]
    found = command.last_line(asked)
    assert found["run"] == str(tmp_path / "r")
    assert list(found["backends"]) == ["hooks", "nnsight", "transformer_lens", "eager"]
    for name, quantities in found["backends"].items():
        everything = ["resid_post", "resid_post, mean", "attn_out", "mlp_out", "rows", "mass"]
        assert list(quantities) == (["resid_post", "rows"] if name == "eager" else everything)
        for numbers in quantities.values():
            assert set(numbers) == {"time_over_forward", "memory_over_forward", "max_difference", "intervals"}
            ends = numbers["intervals"]["time_over_forward"]
            assert 0 < ends["low"] <= numbers["time_over_forward"] <= ends["high"]
            assert numbers["memory_over_forward"] > 0.9
            assert numbers["max_difference"] == 0 if name == "hooks" else numbers["max_difference"] < 1e-5
    ends = found["intervals"]["store_over_plain_write"]
    assert 0 < ends["low"] <= found["store_over_plain_write"] <= ends["high"]
    assert found["n"] == 6
    assert (tmp_path / "r/figures/ratios.png").is_file()
    assert "transformer_lens  rows" in (tmp_path / "r/report.md").read_text()
