"""Values and contracts: errors, configs, adapters, methods. Knows no layer and no model."""
