"""Quotas of tenants: their limits (`limits`), and what the tenants use (`account`)."""
