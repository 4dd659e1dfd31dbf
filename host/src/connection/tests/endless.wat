;; A guest that sends until the host drops its stream, and then returns `ok` all the same.
(component
  (import "wasinetd:tcp/types@0.1.0" (instance $types
    (type $error-code' (variant
      (case "connection-reset")
      (case "connection-broken")
      (case "connection-aborted")
      (case "timeout")
      (case "invalid-state")
      (case "other" (option string))))
    (export "error-code" (type $error-code (eq $error-code')))
    (export "connection" (type $connection (sub resource)))
    (export "[method]connection.send" (func
      (param "self" (borrow $connection))
      (param "data" (stream u8))
      (result (future (result (error $error-code))))))))
  (alias export $types "connection" (type $connection))
  (alias export $types "error-code" (type $error-code))
  (type $bytes (stream u8))

  (core module $memory-module (memory (export "memory") 2))
  (core instance $memory (instantiate $memory-module))
  (core func $send (canon lower (func $types "[method]connection.send")))
  (core func $stream-new (canon stream.new $bytes))
  (core func $stream-write (canon stream.write $bytes async (memory $memory "memory")))
  (core func $set-new (canon waitable-set.new))
  (core func $set-wait (canon waitable-set.wait (memory $memory "memory")))
  (core func $join (canon waitable.join))

  (core module $guest-module
    (import "host" "memory" (memory 2))
    (import "host" "send" (func $send (param i32 i32) (result i32)))
    (import "host" "stream-new" (func $stream-new (result i64)))
    (import "host" "stream-write" (func $stream-write (param i32 i32 i32) (result i32)))
    (import "host" "set-new" (func $set-new (result i32)))
    (import "host" "set-wait" (func $set-wait (param i32 i32) (result i32)))
    (import "host" "join" (func $join (param i32 i32)))
    (func (export "handle-connection") (param $connection i32) (result i32)
      (local $ends i64)
      (local $writable i32)
      (local $set i32)
      (local $status i32)
      (local.set $ends (call $stream-new))
      (local.set $writable (i32.wrap_i64 (i64.shr_u (local.get $ends) (i64.const 32))))
      (drop (call $send (local.get $connection) (i32.wrap_i64 (local.get $ends))))
      (local.set $set (call $set-new))
      (call $join (local.get $writable) (local.get $set))
      (loop $again
        (local.set $status
          (call $stream-write (local.get $writable) (i32.const 1024) (i32.const 65536)))
        (if (i32.eq (local.get $status) (i32.const -1))
          ;; The write is blocked. Its event has two words: the stream, and the status.
          (then
            (drop (call $set-wait (local.get $set) (i32.const 512)))
            (local.set $status (i32.load (i32.const 516)))))
        ;; The low bits of the status are zero if the write was completed.
        (br_if $again (i32.eqz (i32.and (local.get $status) (i32.const 15)))))
      ;; The address of the result: zeros are `ok`.
      (i32.const 0)))
  (core instance $guest (instantiate $guest-module
    (with "host" (instance
      (export "memory" (memory $memory "memory"))
      (export "send" (func $send))
      (export "stream-new" (func $stream-new))
      (export "stream-write" (func $stream-write))
      (export "set-new" (func $set-new))
      (export "set-wait" (func $set-wait))
      (export "join" (func $join))))))

  (func $handle-connection async
    (param "connection" (own $connection))
    (result (result (error $error-code)))
    (canon lift (core func $guest "handle-connection") (memory $memory "memory")))
  (instance $handler (export "handle-connection" (func $handle-connection)))
  (export "wasinetd:tcp/handler@0.1.0" (instance $handler)))
