from reidreg.cli.main import main

raise SystemExit(main())
