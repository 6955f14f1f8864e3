//! Ctrl-C and SIGTERM: noted, so that the run ends with its files written.
//!
//! The first signal asks the run to stop; the second ends the process at once, as without a
//! handler.

use std::sync::atomic::{AtomicI32, Ordering};

static RECEIVED: AtomicI32 = AtomicI32::new(0);

extern "C" fn note(signal: libc::c_int) {
    RECEIVED.store(signal, Ordering::SeqCst);
}

/// Notes SIGINT and SIGTERM from now on, each once.
pub fn install() {
    handle(note as *const () as libc::sighandler_t);
}

/// Notes them no longer: from now on each ends the process at once.
pub fn uninstall() {
    handle(libc::SIG_DFL);
}

fn handle(handler: libc::sighandler_t) {
    for signal in [libc::SIGINT, libc::SIGTERM] {
        // SAFETY: the handler is the default one or only stores to an atomic, which is
        // async-signal-safe; the struct is zeroed, which is a valid value for every field, and
        // then filled.
        #[allow(unsafe_code, reason = "signal handlers have no safe interface in std")]
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler;
            // The default action comes back after the first signal.
            action.sa_flags = libc::SA_RESETHAND | libc::SA_RESTART;
            libc::sigemptyset(&mut action.sa_mask);
            libc::sigaction(signal, &action, std::ptr::null_mut());
        }
    }
}

/// The signal received, if any.
pub fn received() -> Option<i32> {
    match RECEIVED.load(Ordering::SeqCst) {
        0 => None,
        signal => Some(signal),
    }
}
