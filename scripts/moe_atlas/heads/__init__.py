"""What routers over attention heads do, and the experts behind them: MoA models and JetMoE under one lens.

Sources: MoA (Zhang et al. 2022, arXiv 2210.05144, sections 4 and 5) and JetMoE (Shen et al. 2024, 2404.07413). Every
statistic comes with what it is by chance, and where documents can be drawn again with an interval over them.
"""
