"""Scripts that remake the README's figures."""
