package main

import (
	"context"
	"fmt"
	"time"

	"github.com/segmentio/kafka-go"
)

var kafkaGoCodecs = map[string]kafka.Compression{
	"none":   0,
	"gzip":   kafka.Gzip,
	"snappy": kafka.Snappy,
	"lz4":    kafka.Lz4,
	"zstd":   kafka.Zstd,
}

func kafkaGo(brokers []string, topic string) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	address := kafka.TCP(brokers...)
	client := &kafka.Client{Addr: address, Timeout: patience}
	if err := kafkaGoCreate(ctx, client, topic); err != nil {
		return err
	}
	for turn := range 2 {
		for _, codec := range codecs {
			var messages []kafka.Message
			for _, value := range values(turn, codec) {
				messages = append(messages, kafka.Message{Key: []byte(value), Value: []byte(value)})
			}
			writer := &kafka.Writer{
				Addr:         address,
				Topic:        topic,
				RequiredAcks: kafka.RequireAll,
				BatchTimeout: 10 * time.Millisecond,
				Compression:  kafkaGoCodecs[codec],
			}
			if err := first(writer.WriteMessages(ctx, messages...), writer.Close()); err != nil {
				return err
			}
		}
		if err := kafkaGoRead(ctx, brokers, topic, turn); err != nil {
			return err
		}
	}
	return kafkaGoAdmin(ctx, client, topic)
}

func kafkaGoCreate(ctx context.Context, client *kafka.Client, topic string) error {
	topics := []kafka.TopicConfig{{Topic: topic, NumPartitions: 2, ReplicationFactor: 1}}
	created, err := client.CreateTopics(ctx, &kafka.CreateTopicsRequest{Topics: topics})
	if err != nil {
		return err
	}
	// Apache Kafka answers before all of it knows the topic.
	for {
		metadata, err := client.Metadata(ctx, &kafka.MetadataRequest{Topics: []string{topic}})
		if err != nil {
			return err
		}
		if metadata.Topics[0].Error == nil && len(metadata.Topics[0].Partitions) == 2 {
			return created.Errors[topic]
		}
		time.Sleep(100 * time.Millisecond)
	}
}

func kafkaGoRead(ctx context.Context, brokers []string, topic string, turn int) error {
	reader := kafka.NewReader(kafka.ReaderConfig{
		Brokers:     brokers,
		GroupID:     topic,
		Topic:       topic,
		StartOffset: kafka.FirstOffset,
		MaxWait:     100 * time.Millisecond,
	})
	var seen []string
	for len(seen) < len(all(turn)) {
		message, err := reader.FetchMessage(ctx)
		if err != nil {
			return err
		}
		seen = append(seen, string(message.Value))
		if err := reader.CommitMessages(ctx, message); err != nil {
			return err
		}
	}
	return first(same(seen, all(turn)), reader.Close())
}

func kafkaGoAdmin(ctx context.Context, client *kafka.Client, topic string) error {
	changed, err := client.IncrementalAlterConfigs(ctx, &kafka.IncrementalAlterConfigsRequest{
		Resources: []kafka.IncrementalAlterConfigsRequestResource{{
			ResourceType: kafka.ResourceTypeTopic,
			ResourceName: topic,
			Configs: []kafka.IncrementalAlterConfigsRequestConfig{
				{Name: "retention.ms", Value: "77777", ConfigOperation: kafka.ConfigOperationSet},
			},
		}},
	})
	if err = first(err, changed.Resources[0].Error); err != nil {
		return err
	}
	err = until("the configuration is told", func() (bool, error) {
		described, err := client.DescribeConfigs(ctx, &kafka.DescribeConfigsRequest{
			Resources: []kafka.DescribeConfigRequestResource{{
				ResourceType: kafka.ResourceTypeTopic,
				ResourceName: topic,
				ConfigNames:  []string{"retention.ms"},
			}},
		})
		if err != nil {
			return false, err
		}
		return described.Resources[0].ConfigEntries[0].ConfigValue == "77777", nil
	})
	if err != nil {
		return err
	}
	offsets, err := client.ConsumerOffsets(ctx, kafka.TopicAndGroup{Topic: topic, GroupId: topic})
	if err != nil {
		return err
	}
	if offsets[0]+offsets[1] != int64(2*len(all(0))) {
		return fmt.Errorf("offsets of the group: %v", offsets)
	}
	groups, err := client.DeleteGroups(ctx, &kafka.DeleteGroupsRequest{GroupIDs: []string{topic}})
	if err = first(err, groups.Errors[topic]); err != nil {
		return err
	}
	topics, err := client.DeleteTopics(ctx, &kafka.DeleteTopicsRequest{Topics: []string{topic}})
	return first(err, topics.Errors[topic])
}
