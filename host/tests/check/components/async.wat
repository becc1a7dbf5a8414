(component
  (core module $code (import "" "get" (func (result i32))))
  (core func $get (canon context.get i32 0))
  (core instance (instantiate $code (with "" (instance (export "get" (func $get))))))
  (component $handler-code)
  (instance $handler (instantiate $handler-code))
  (export "stagehost:stage/handler@0.1.0" (instance $handler))
)
