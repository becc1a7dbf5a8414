(component
  (component $run-code)
  (instance $run (instantiate $run-code))
  (export "wasi:cli/run@0.2.6" (instance $run))
)
