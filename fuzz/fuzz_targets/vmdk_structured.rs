#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| img_tcmu_fuzz::run("vmdk_structured", data));
