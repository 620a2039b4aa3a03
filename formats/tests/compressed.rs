//! Streams made by other people's tools read as what they were made from: whole, at random, scattered, by several threads.

mod streams;

use streams::Workshop;

const LEN: usize = (6 << 20) + 4321;

macro_rules! streams {
    ($($name:ident: $command:literal;)*) => {
        $(
            #[test]
            fn $name() {
                let workshop = Workshop::new(LEN);
                workshop.run($command);
                workshop.check("out");
                // Again, from the stored index where there is one.
                workshop.check("out");
            }
        )*
    };
}

streams! {
    gzip: "gzip -6c disk > out";
    gzip_fast: "gzip -1c disk > out";
    gzip_best: "gzip -9c disk > out";
    gzip_named: "gzip -kN disk; mv disk.gz out";
    gzip_members: "split -b 300000 disk part.; for p in part.*; do gzip -c $p >> out; done";
    gzip_padded: "(gzip -c disk; head -c 5000 /dev/zero) > out";
    gzip_then_garbage: "(gzip -c disk; echo garbage) > out";
    pigz: "pigz -p4 -c disk > out";
    pigz_independent: "pigz -p4 -ib 128 -c disk > out";
    pigz_zopfli: "head -c 6295777 disk | pigz -11 -I1 -p2 -c > out";
    gzip_of_stored_blocks: "python3 -c 'import gzip,sys; sys.stdout.buffer.write(gzip.compress(open(\"disk\",\"rb\").read(), 0))' > out";
    gzip_of_fixed_codes: "python3 -c 'import zlib,sys; c=zlib.compressobj(9,8,31,9,zlib.Z_FIXED); d=open(\"disk\",\"rb\").read(); sys.stdout.buffer.write(c.compress(d)+c.flush())' > out";
    gzip_of_short_matches: "python3 -c 'import zlib,sys; c=zlib.compressobj(9,8,31,9,zlib.Z_HUFFMAN_ONLY); d=open(\"disk\",\"rb\").read(); sys.stdout.buffer.write(c.compress(d)+c.flush())' > out";
    gzip_of_runs: "python3 -c 'import zlib,sys; c=zlib.compressobj(9,8,31,9,zlib.Z_RLE); d=open(\"disk\",\"rb\").read(); sys.stdout.buffer.write(c.compress(d)+c.flush())' > out";
    bgzip: "bgzip -c disk > out";
    bgzip_with_index: "bgzip -i -I out.gzi -c disk > out; test -s out.gzi";
    bgzip_with_foreign_index: "cp disk other; echo x | cat - disk > other; bgzip -i -I out.gzi -c other > /dev/null; bgzip -c disk > out";
    xz_single_block: "xz -1c disk > out";
    xz_blocks: "xz -1 -T2 --block-size=1MiB -c disk > out";
    xz_streams: "split -b 1000000 disk part.; for p in part.*; do xz -0c $p >> out; head -c 8 /dev/zero >> out; done";
    xz_checks: "split -n 4 disk part.; (xz -0C none -c part.aa; xz -0C crc32 -c part.ab; xz -0C crc64 -c part.ac; xz -0C sha256 -c part.ad) > out";
    xz_filters: "xz --x86 --lzma2=preset=1 --block-size=2MiB -c disk > out";
    pixz: "pixz -t -0 -f 0.25 disk out";
    zstd: "zstd -qc disk > out";
    zstd_threads: "zstd -q -T2 -c disk > out";
    zstd_from_a_pipe: "cat disk | zstd -qc > out";
    zstd_frames: "split -b 500000 disk part.; for p in part.*; do zstd -qc $p >> out; done";
    zstd_frames_without_sizes: "split -b 500000 disk part.; for p in part.*; do zstd -qc < $p >> out; done";
    zstd_without_checksums: "zstd -q --no-check -19 -c disk > out";
    pzstd: "pzstd -q -p 2 -c disk > out";
    // pip install pyzstd; DISSECT_PYTHON names the Python that has it (`make readers`).
    zstd_seekable: "${DISSECT_PYTHON:-python3} -c 'import pyzstd; f = pyzstd.SeekableZstdFile(\"out\", \"w\", max_frame_content_size=300000); f.write(open(\"disk\", \"rb\").read()); f.close()'";
    bzip2: "bzip2 -c disk > out";
    bzip2_small_blocks: "bzip2 -1c disk > out";
    lbzip2: "lbzip2 -n2 -c disk > out";
    pbzip2: "pbzip2 -p2 -b3 -c disk > out";
    lz4: "lz4 -qc disk > out";
    lz4_small_blocks: "lz4 -q -B4 -BI -c disk > out";
    lz4_linked: "lz4 -q -B4 -BD -c disk > out";
    lz4_block_checksums: "lz4 -q -B5 -BX -c disk > out";
    lz4_content_size: "lz4 -q --content-size -B6 -9 -c disk > out";
    lz4_no_frame_checksum: "lz4 -q --no-frame-crc -B4 -c disk > out";
    lz4_frames: "split -b 500000 disk part.; for p in part.*; do lz4 -q -B4 -BD -c $p >> out; done";
    lzip: "lzip.lzip -1c disk > out";
    lzip_members: "lzip.lzip -1 -b 1MiB -c disk > out";
    plzip: "plzip -0 -n2 -B 1MiB -c disk > out";
    lzip_padded: "(lzip.lzip -0 -b 2MiB -c disk; head -c 999 /dev/zero) > out";
}
