"""Mixture-of-experts layers of a step: only the experts that the routing loads (METHOD section 4)."""
